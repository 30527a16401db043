"""Linear attention of one token per sequence: the recurrence itself, for decoding."""

import torch
from torch import Tensor

from .types import LinearState

# Dimensions: N sequences, H query heads, Hk key heads, HV value heads, R query heads per key head, K key
# width, V value width


def linear_attention_single(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    *,
    rule: str,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """`memzoo.kernels.linear_attention` for T = 1 without packing; arguments are already checked.

    No chunk has to be cut out or padded, which is most of the time of a call with one token.
    """
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_key_heads, num_value_heads = k.shape[2], v.shape[2]
    repeats = num_value_heads // num_key_heads
    wide_q, wide_k, wide_v = (x.squeeze(1).to(acc) for x in (q, k, v))  # (N, H, K), (N, Hk, K), (N, HV, V)
    step = None if beta is None else beta.squeeze(1).to(acc)[..., None]  # (N, HV, 1)
    decay = None
    if g is not None:
        # as in a chunk: numbers too small to be seen are not made, because denormal ones are slow
        decay = g.squeeze(1).to(acc).clamp(min=-700.0 if acc == torch.float64 else -60.0).exp()
        decay = decay.reshape(*decay.shape[:2], -1)  # (N, Hk or HV, 1 or K)
    memory, normalizer = (None, None) if initial_state is None else initial_state
    if normalize:
        if normalizer is not None and decay is not None:
            normalizer = normalizer * decay
        written = wide_k if step is None else wide_k * step
        normalizer = written if normalizer is None else normalizer + written  # (N, Hk, K)
    key = wide_k.repeat_interleave(repeats, 1) if repeats > 1 else wide_k  # (N, HV, K)
    if memory is not None and decay is not None:
        if decay.shape[1] != num_value_heads:
            decay = decay.repeat_interleave(repeats, 1)
        memory = memory * decay[..., None]
    write = wide_v
    if rule == "delta" and memory is not None:
        write = wide_v - (key[..., None, :] @ memory).squeeze(-2)  # (N, HV, V)
    write = write if step is None else write * step
    product = key[..., None] @ write[..., None, :]  # (N, HV, K, V)
    memory = product if memory is None else memory + product
    query = (wide_q * scale).unflatten(1, (num_key_heads, -1))  # (N, Hk, R, K)
    read = query.repeat_interleave(repeats, 1) if repeats > 1 else query  # (N, HV, R, K)
    output = (read @ memory).flatten(1, 2)  # (N, max(H, HV), V)
    if normalize:
        assert normalizer is not None
        weight = query @ normalizer[..., None] + eps  # (N, Hk, R, 1)
        weight = weight.repeat_interleave(repeats, 1) if repeats > 1 else weight
        output = output / weight.flatten(1, 2)
    return output[:, None].to(q.dtype), LinearState(memory, normalizer if normalize else None)
