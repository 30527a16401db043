"""The fast-weight memory by the definition: sequence by sequence, token by token.

The gradient of the loss of a token is taken by automatic differentiation of the loss itself. For token t of
chunk j, with the row renormalisation N and the placements of update.py:

    o_t = f(q_t; read point)
    U  <- U - eta_t dL(f(k_t), v_t)/dW at the gradient point
    at the last token of a chunk: U <- U min(1, limit / |U|) per matrix,  M <- mean(mu) M + U,  D = M (or its
    orthogonal factor),  W <- as `fast_norm` says
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .newton_schulz import newton_schulz
from .types import FastWeightState, Rule, pack

# Dimensions: B batch, T tokens, N sequences, H heads, D width of keys, E width of values, R matrices


def fast_weight_scan_reference(
    tokens: Sequence[Any],
    lengths: tuple[int, ...],
    row_norms: tuple[Tensor, ...],
    state: FastWeightState,
    rule: Rule,
    *,
    num_seen: Sequence[int],
) -> tuple[Tensor, FastWeightState]:
    """The definition of `memzoo.kernels.fast_weight_scan`; arguments are already checked."""
    acc = state.weights.dtype
    rows: list[Any] = [None if x is None else x.to(acc).flatten(0, 1).split(list(lengths)) for x in tokens]
    q, k, v, rates, gates = rows
    outputs: list[Tensor] = []
    finals: list[list[Any]] = []
    for n, (length, seen) in enumerate(zip(lengths, num_seen, strict=True)):
        weights = rule.unpack(state.weights[n])  # (H, rows, columns)
        pending = rule.unpack(state.pending[n])
        momentum = None if state.momentum is None else rule.unpack(state.momentum[n])
        gate_sum: Any = None if state.momentum_sum is None else state.momentum_sum[n]
        for t in range(length):
            normal = [_renormalised(x, target) for x, target in zip(weights, row_norms, strict=True)]
            is_raw = rule.fast_norm in ("none", "post") or (
                rule.fast_norm == "pre" and seen + t < rule.chunk_size
            )
            point = weights if is_raw else normal
            outputs.append(_answer(q[n][t], point if rule.fast_norm == "pre" else weights, rule))
            grads = _gradients(point, k[n][t], v[n][t], rule)
            pending = [
                total - rate[:, None, None] * grad
                for total, rate, grad in zip(pending, rates[n][t].unbind(-1), grads, strict=True)
            ]
            gate_sum = None if gate_sum is None else gate_sum + gates[n][t]
            if (seen + t + 1) % rule.chunk_size:
                continue
            steps = pending
            if rule.max_grad_norm is not None:
                steps = [_clipped(step, rule.max_grad_norm) for step in steps]
            if momentum is not None:
                kept = (gate_sum / rule.chunk_size)[:, None, None]
                steps = momentum = [kept * old + step for old, step in zip(momentum, steps, strict=True)]
                gate_sum = torch.zeros_like(gate_sum)
            if rule.optimizer == "muon":
                steps = [newton_schulz(step, rule.ns_steps, dtype=rule.ns_dtype) for step in steps]
            start = normal if rule.fast_norm == "internal" else weights
            weights = [x + step for x, step in zip(start, steps, strict=True)]
            if rule.fast_norm == "post":
                weights = [_renormalised(x, target) for x, target in zip(weights, row_norms, strict=True)]
            pending = [torch.zeros_like(x) for x in pending]
            if rule.bptt_chunks is not None and (seen + t + 1) % (rule.bptt_chunks * rule.chunk_size) == 0:
                weights = [x.detach() for x in weights]
                momentum = None if momentum is None else [x.detach() for x in momentum]
        finals.append([pack(weights), pack(pending), None if momentum is None else pack(momentum), gate_sum])
    output = torch.stack(outputs).reshape(tokens[2].shape) if outputs else torch.zeros_like(tokens[2])
    columns: list[Any] = [None if c[0] is None else torch.stack(c) for c in zip(*finals, strict=True)]
    num_tokens = torch.tensor([seen + n for seen, n in zip(num_seen, lengths, strict=True)])
    return output.to(tokens[0].dtype), FastWeightState(columns[0], columns[1], num_tokens, *columns[2:])


def _answer(x: Tensor, weights: Sequence[Tensor], rule: Rule) -> Tensor:
    """f(x) for one token, (H, D) -> (H, E)."""
    hidden = [(matrix @ x[..., None])[..., 0] for matrix in weights[:-1]]
    if rule.net == "linear":
        top = x
    elif rule.net == "mlp":
        top = F.gelu(hidden[0], approximate="tanh")
    else:
        top = F.silu(hidden[0]) * hidden[1]
    out = (weights[-1] @ top[..., None])[..., 0]
    return out + x if rule.residual else out


def _loss(weights: Sequence[Tensor], k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The loss of one token, summed over heads, which do not share weights."""
    answer = _answer(k, weights, rule)
    return -(answer * v).sum() if rule.loss == "dot" else 0.5 * (answer - v).square().sum()


def _gradients(weights: Sequence[Tensor], k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    """Gradient of the loss by each matrix; the caller may differentiate it once more."""
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, k, v))
    with torch.enable_grad():
        points = [x if x.requires_grad else x.detach().requires_grad_() for x in weights]
        return torch.autograd.grad(_loss(points, k, v, rule), points, create_graph=is_recorded)


def _renormalised(matrix: Tensor, lengths: Tensor) -> Tensor:
    return matrix * (lengths / (matrix.norm(dim=-1) + 1e-5))[..., None]


def _clipped(step: Tensor, limit: float) -> Tensor:
    """Per head: (H, rows, columns)."""
    return step * (limit / step.flatten(1).norm(dim=-1).clamp(min=limit))[:, None, None]
