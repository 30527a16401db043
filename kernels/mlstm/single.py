"""mLSTM of one token per sequence: the recurrence itself, for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import weight_floor
from .types import MLSTMState

# Dimensions: N sequences, H heads, K key width, V value width


def mlstm_single(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float,
    eps: float,
    initial_state: MLSTMState | None,
) -> tuple[Tensor, MLSTMState]:
    """`memzoo.kernels.mlstm` for T = 1 without packing; arguments are already checked."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    query, key, value = (x.squeeze(1).to(acc)[..., None, :] for x in (q, k, v))  # (N, H, 1, K or V)
    i_t, kept = input_gate.squeeze(1).to(acc), F.logsigmoid(forget_gate.squeeze(1).to(acc))  # (N, H)
    if initial_state is not None:
        kept = kept + initial_state.stabilizer
    stabilizer = torch.maximum(kept, i_t)
    # as in a chunk: factors too small to be seen are not made, because denormal numbers are slow
    floor = -700.0 if acc == torch.float64 else -60.0
    forget = (kept - stabilizer).clamp(min=floor).exp()[..., None, None]
    key = (i_t - stabilizer).clamp(min=floor).exp()[..., None, None] * key
    memory, normalizer = key.transpose(-1, -2) @ value, key
    if initial_state is not None:
        memory = memory + forget * initial_state.memory
        normalizer = normalizer + forget * initial_state.normalizer[..., None, :]
    weight = scale * (query * normalizer).sum(-1)  # (N, H, 1)
    weight = torch.maximum(weight.abs(), weight_floor(stabilizer)[..., None]) + eps
    output = ((scale * query) @ memory).squeeze(2) / weight  # (N, H, V)
    return output[:, None].to(q.dtype), MLSTMState(memory, normalizer.squeeze(2), stabilizer)
