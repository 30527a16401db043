"""Checks of the arguments of linear attention."""

import torch
from torch import Tensor

from ..checks import check_dtypes, check_rank
from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key heads, HV value heads, K key width, V
# value width

_RULES = ("additive", "delta")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    *,
    rule: str,
    normalize: bool,
    eps: float,
    chunk_size: int,
) -> None:
    """Raise ValueError unless the arguments of `memzoo.kernels.linear_attention` fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, K)")
    check_dtypes(q=q, k=k, v=v)
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(
            "q, k and v must agree in batch and tokens, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one width per head, got {q.shape[3]} and {k.shape[3]}.")
    num_heads, num_key_heads, num_value_heads = q.shape[2], k.shape[2], v.shape[2]
    if (
        num_key_heads < 1
        or num_heads % num_key_heads
        or num_value_heads % num_key_heads
        or num_key_heads not in (num_heads, num_value_heads)
    ):
        raise ValueError(
            "the number of key heads must divide the heads of q and v and equal one of them, got "
            f"q {num_heads}, k {num_key_heads} and v {num_value_heads} heads."
        )
    if rule not in _RULES:
        raise ValueError(f"rule must be 'additive' or 'delta', got {rule!r}.")
    if normalize and rule == "delta":
        raise ValueError(
            "normalize=True divides by a sum of keys, which the delta rule does not keep. "
            "Use normalize=False, or rule='additive'."
        )
    if g is not None:
        _check_decay(g, q, k, v, normalize)
    if beta is not None:
        _check_beta(beta, k, v, rule, normalize)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}.")


def check_state(
    state: LinearState, k: Tensor, v: Tensor, num_sequences: int, acc: torch.dtype, normalize: bool
) -> None:
    """Raise ValueError unless `state` can be continued by a call on `k` and `v`."""
    expected = (num_sequences, v.shape[2], k.shape[3], v.shape[3])
    if tuple(state.memory.shape) != expected:
        raise ValueError(
            f"initial_state.memory must have shape {expected} = (sequences, value heads, key width, value "
            "width), got "
            f"{tuple(state.memory.shape)}. Select the rows of the state that continue in this call."
        )
    if normalize and state.normalizer is None:
        raise ValueError(
            "normalize=True continues a sum of keys, but initial_state has only its memory. "
            "Give LinearState(memory, normalizer), or start with initial_state=None."
        )
    expected_normalizer = (num_sequences, k.shape[2], k.shape[3])
    if normalize and state.normalizer is not None and tuple(state.normalizer.shape) != expected_normalizer:
        raise ValueError(
            f"initial_state.normalizer must have shape {expected_normalizer} = "
            f"(sequences, key heads, key width), got {tuple(state.normalizer.shape)}."
        )
    if state.memory.dtype != acc or (
        normalize and state.normalizer is not None and state.normalizer.dtype != acc
    ):
        raise ValueError(
            f"the state of a call with {k.dtype} inputs must be {acc}, got {state.memory.dtype}. Convert it, "
            "or start with initial_state=None."
        )


def check_log_decay(g: Tensor, name: str = "g") -> None:
    """Raise ValueError if a log-decay is above 0 (looked at on the CPU only)."""
    if not torch.compiler.is_compiling() and g.device.type == "cpu" and g.numel() and g.detach().amax() > 0:
        raise ValueError(
            f"{name} is a log-decay and must be at most 0, got a maximum of {g.detach().amax().item():.6g}."
        )


def _check_decay(g: Tensor, q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> None:
    num_key_heads, num_value_heads, width = k.shape[2], v.shape[2], k.shape[3]
    heads = (num_key_heads, num_value_heads)
    per_head = g.dim() == 3 and g.shape[2] in heads
    per_channel = g.dim() == 4 and g.shape[2] in heads and g.shape[3] == width
    if g.shape[:2] != q.shape[:2] or not (per_head or per_channel):
        raise ValueError(
            f"g must have shape {(*q.shape[:2], num_key_heads)} or {(*q.shape[:2], num_value_heads)}: one "
            "log-decay per token and key or value head, with a last axis of the key width "
            f"{width} for one per key channel, got {tuple(g.shape)}."
        )
    if normalize and g.shape[2] != num_key_heads:
        raise ValueError(
            f"normalize needs one decay per key head ({num_key_heads}), because the normaliser is a sum of "
            f"keys, got {g.shape[2]}."
        )
    check_log_decay(g)


def _check_beta(beta: Tensor, k: Tensor, v: Tensor, rule: str, normalize: bool) -> None:
    if beta.shape != v.shape[:3]:
        raise ValueError(
            f"beta must have shape {tuple(v.shape[:3])}: one number per token and value head, got "
            f"{tuple(beta.shape)}."
        )
    if normalize and k.shape[2] != v.shape[2]:
        raise ValueError(
            f"normalize with beta needs as many key heads as value heads ({v.shape[2]}), because the "
            f"normaliser is a sum of keys, got {k.shape[2]}."
        )
    if rule != "delta" or torch.compiler.is_compiling() or beta.device.type != "cpu" or not beta.numel():
        return
    low, high = (x.item() for x in beta.detach().aminmax())
    if low < 0 or high > 2:
        raise ValueError(
            f"beta of the delta rule must lie in [0, 2], got {low:.6g} to {high:.6g}. Use a sigmoid for "
            "[0, 1], or twice a sigmoid to allow negative eigenvalues."
        )
