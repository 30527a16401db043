"""Linear attention by the definition, token by token.

S~_t = Diag(exp(g_t)) S_{t-1}                              g_t one number per head, or one per key channel
S_t  = S~_t + k_t^T beta_t v_t                             rule "additive"
S_t  = S~_t + k_t^T beta_t (v_t - k_t S~_t)                rule "delta"
n_t  = exp(g_t) n_{t-1} + beta_t k_t
o_t  = (scale q_t) S_t                                     without normaliser
o_t  = (scale q_t) S_t / ((scale q_t) . n_t + eps)         with normaliser
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
    beta: Tensor | None,
    lengths: tuple[int, ...],
    *,
    rule: str,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """The definition of `memzoo.kernels.linear_attention`; arguments are already checked."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_heads, num_value_heads, num_key_heads = q.shape[2], v.shape[2], k.shape[2]
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v)]
    rows_g, rows_beta = (
        None if x is None else x.to(acc).flatten(0, 1).split(list(lengths)) for x in (g, beta)
    )
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
                decay = rows_g[n][t].exp().reshape(rows_g[n].shape[1], -1)  # (Hk or HV, 1 or K)
                memory = memory * _repeat(decay, num_value_heads)[..., None]
                normalizer = normalizer * decay if normalize else normalizer
            write = v_t
            if rule == "delta":
                write = v_t - torch.einsum("hk,hkv->hv", _repeat(k_t, num_value_heads), memory)
            if rows_beta is not None:
                write = write * rows_beta[n][t][:, None]
            memory = memory + torch.einsum("hk,hv->hkv", _repeat(k_t, num_value_heads), write)  # (HV, K, V)
            out_heads = max(num_heads, num_value_heads)
            out = torch.einsum("hk,hkv->hv", _repeat(q_t, out_heads) * scale, _repeat(memory, out_heads))
            if normalize:
                normalizer = normalizer + (k_t if rows_beta is None else k_t * rows_beta[n][t][:, None])
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
