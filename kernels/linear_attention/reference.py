"""Linear attention by the definition, token by token (additive rule of the recurrence).

S_t = exp(g_t) S_{t-1} + k_t v_t^T
n_t = exp(g_t) n_{t-1} + k_t
o_t = (scale q_t) S_t                      without normaliser
o_t = (scale q_t) S_t / ((scale q_t) . n_t + eps)
"""

import torch
from torch import Tensor

from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key heads, HV value heads, K key width, V
# value width


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    lengths: tuple[int, ...],
    *,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """The definition of `memzoo.kernels.linear_attention`; arguments are already checked."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_heads, num_value_heads, num_key_heads = q.shape[2], v.shape[2], k.shape[2]
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v)]
    rows_g = None if g is None else g.to(acc).flatten(0, 1).split(list(lengths))
    outputs, memories, normalizers = [], [], []
    for n, length in enumerate(lengths):
        if initial_state is None:
            memory = v.new_zeros(num_value_heads, k.shape[3], v.shape[3], dtype=acc)
            normalizer = k.new_zeros(num_key_heads, k.shape[3], dtype=acc)
        else:
            memory = initial_state.memory[n]
            normalizer = k.new_zeros(()) if initial_state.normalizer is None else initial_state.normalizer[n]
        for t in range(length):
            q_t, k_t, v_t = (x[n][t] for x in rows)
            if rows_g is not None:
                decay = rows_g[n][t].exp()
                memory = memory * _repeat(decay, num_value_heads)[:, None, None]
                normalizer = normalizer * decay[:, None] if normalize else normalizer
            memory = memory + torch.einsum("hk,hv->hkv", _repeat(k_t, num_value_heads), v_t)  # (HV, K, V)
            out_heads = max(num_heads, num_value_heads)
            out = torch.einsum("hk,hkv->hv", _repeat(q_t, out_heads) * scale, _repeat(memory, out_heads))
            if normalize:
                normalizer = normalizer + k_t  # (Hk, K)
                weight = torch.einsum(
                    "hk,hk->h", _repeat(q_t, out_heads) * scale, _repeat(normalizer, out_heads)
                )
                out = out / (weight[:, None] + eps)
            outputs.append(out)
        memories.append(memory)
        normalizers.append(normalizer)
    shape = (*q.shape[:2], max(num_heads, num_value_heads), v.shape[3])
    output = torch.stack(outputs).reshape(shape) if outputs else v.new_zeros(shape)
    state = LinearState(torch.stack(memories), torch.stack(normalizers) if normalize else None)
    return output.to(q.dtype), state


def _repeat(x: Tensor, num_heads: int) -> Tensor:
    """Repeat heads (the first axis) so that there are `num_heads`."""
    return x.repeat_interleave(num_heads // x.shape[0], dim=0)
