"""mLSTM by the definition, token by token (Beck et al., arXiv 2405.04517, equations 19 to 27).

m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)
f'  = exp(logsigmoid(f_t) + m_{t-1} - m_t),   i' = exp(i_t - m_t)
C_t = f' C_{t-1} + i' k_t v_t^T,   n_t = f' n_{t-1} + i' k_t
h_t = (scale q_t) C_t / (max(|(scale q_t) . n_t|, exp(-m_t)) + eps)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import MLSTMState

# Dimensions: B batch, T tokens, N sequences, H heads, K key width, V value width


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    eps: float,
    initial_state: MLSTMState | None,
) -> tuple[Tensor, MLSTMState]:
    """The definition of `memzoo.kernels.mlstm`; arguments are already checked."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_heads, key_width, value_width = q.shape[2], q.shape[3], v.shape[3]
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v, input_gate, forget_gate)]
    outputs: list[Tensor] = []
    finals: list[tuple[Tensor, Tensor, Tensor]] = []
    for n, length in enumerate(lengths):
        if initial_state is None:
            memory = q.new_zeros(num_heads, key_width, value_width, dtype=acc)
            normalizer = q.new_zeros(num_heads, key_width, dtype=acc)
            stabilizer = q.new_zeros(num_heads, dtype=acc)
        else:
            memory, normalizer, stabilizer = (part[n] for part in initial_state)
        for t in range(length):
            q_t, k_t, v_t, i_t, f_t = (x[n][t] for x in rows)
            kept = F.logsigmoid(f_t) + stabilizer
            stabilizer = torch.maximum(kept, i_t)
            forget, write = (kept - stabilizer).exp(), (i_t - stabilizer).exp()  # (H,)
            memory = forget[:, None, None] * memory + write[:, None, None] * k_t[:, :, None] * v_t[:, None]
            normalizer = forget[:, None] * normalizer + write[:, None] * k_t
            weight = scale * (q_t * normalizer).sum(-1)
            weight = torch.maximum(weight.abs(), weight_floor(stabilizer)) + eps
            outputs.append(torch.einsum("hk,hkv->hv", scale * q_t, memory) / weight[:, None])
        finals.append((memory, normalizer, stabilizer))
    output = torch.stack(outputs).reshape(v.shape) if outputs else torch.zeros_like(v)
    state = MLSTMState(*(torch.stack(parts) for parts in zip(*finals, strict=True)))
    return output.to(q.dtype), state


def weight_floor(stabilizer: Tensor) -> Tensor:
    """exp(-m), below which no denominator falls; finite, as the gradient of infinity is no number."""
    largest = math.log(torch.finfo(stabilizer.dtype).max) - 1
    return (-stabilizer).clamp(max=largest).exp()
