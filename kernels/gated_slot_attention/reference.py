"""Gated slot attention by the definition, token by token.

P_t = P_{t-1} Diag(exp(g_t)) + k_t^T s_t        a_t = softmax(scale q_t P_t)
R_t = Diag(exp(g_t)) R_{t-1} + s_t^T v_t        o_t = a_t R_t
"""

import torch
from torch import Tensor

from .types import SlotState

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key/value heads, K key width, V value width,
# M slots


def gated_slot_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    g: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    initial_state: SlotState | None,
) -> tuple[Tensor, SlotState]:
    """The definition of `memzoo.kernels.gated_slot_attention`; arguments are already checked."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_groups = q.shape[2] // k.shape[2]
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v, slots, g)]
    outputs, final_keys, final_values = [], [], []
    for n, length in enumerate(lengths):
        if initial_state is None:
            keys = k.new_zeros(*k.shape[2:], slots.shape[3], dtype=acc)  # (Hk, K, M)
            values = v.new_zeros(v.shape[2], slots.shape[3], v.shape[3], dtype=acc)  # (Hk, M, V)
        else:
            keys, values = initial_state.keys[n], initial_state.values[n]
        for t in range(length):
            q_t, k_t, v_t, s_t, g_t = (x[n][t] for x in rows)
            decay = g_t.exp()  # (Hk, M)
            keys = keys * decay[:, None] + k_t[:, :, None] * s_t[:, None]
            values = values * decay[:, :, None] + s_t[:, :, None] * v_t[:, None]
            read = q_t.unflatten(0, (-1, num_groups)) * scale  # (Hk, H / Hk, K)
            weights = torch.softmax(read @ keys, -1)
            outputs.append((weights @ values).flatten(0, 1))  # (H, V)
        final_keys.append(keys)
        final_values.append(values)
    shape = (*q.shape[:3], v.shape[3])
    output = torch.stack(outputs).reshape(shape) if outputs else v.new_zeros(shape)
    return output.to(q.dtype), SlotState(torch.stack(final_keys), torch.stack(final_values))
