"""The neural memory of Titans by the definition, token by token (arXiv 2501.00663).

The gradient is left to autograd.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Rule, Tensors, TitansState
from .update import orthogonal

# Dimensions: N sequences, H heads, F head width


def titans_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gates: Tensor,
    lengths: tuple[int, ...],
    rule: Rule,
    state: TitansState,
) -> tuple[Tensor, TitansState]:
    """The definition of `memzoo.kernels.titans`; arguments are already checked."""
    acc = state.weights[0].dtype
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v, rate, gates)]
    outputs: list[Tensor] = []
    finals: list[TitansState] = []
    for n, length in enumerate(lengths):
        own = _row(state, n)
        for t in range(length):
            q_t, k_t, v_t, rate_t, gates_t = (x[n][t] for x in rows)
            own = _after(own, (k_t, v_t, rate_t, gates_t), rule)
            outputs.append(_net(own.weights, q_t))
        finals.append(own)
    output = torch.stack(outputs).reshape(q.shape) if outputs else torch.zeros_like(q)
    nets = [
        tuple(torch.stack(x) for x in zip(*parts, strict=True))
        for parts in zip(*[f[:4] for f in finals], strict=True)
    ]
    sums = [own.gates for own in finals if own.gates is not None]
    position = tuple(own.position[0] for own in finals)
    final = TitansState(nets[0], nets[1], nets[2], nets[3], torch.stack(sums) if sums else None, position)
    return output.to(q.dtype), final


def _after(state: TitansState, token: Tensors, rule: Rule) -> TitansState:
    """State of one sequence after one token: key and value (H, F), rate (H,), gates (H, 2)."""
    key, value, rate, logits = token
    place = state.position[0] + 1
    is_full = place % rule.chunk_size == 0
    gradients = _gradients(state.base, key, value)
    update = tuple(-rule.loss_scale * rate[:, None, None] * g for g in gradients)
    gates = state.gates
    pending = state.pending
    if not rule.per_token:
        assert gates is not None
        update = tuple(p + u for p, u in zip(pending, update, strict=True))
        gates = gates + logits
        if not is_full:
            return state._replace(pending=update, gates=gates, position=(place % rule.period,))
        logits = gates / rule.chunk_size
        pending, gates = tuple(torch.zeros_like(u) for u in update), torch.zeros_like(gates)
        if rule.max_grad_norm is not None:
            norms = [(torch.linalg.matrix_norm(u, keepdim=True)).clamp(min=1e-15) for u in update]
            largest = rule.max_grad_norm
            update = tuple(u / n * largest * (n / largest).tanh() for u, n in zip(update, norms, strict=True))
    decay, keep = logits.sigmoid()[..., None, None].unbind(1)  # (H, 1, 1)
    momentum = state.momentum
    if rule.use_momentum:
        momentum = update = tuple(keep * s + u for s, u in zip(momentum, update, strict=True))
    if rule.orthogonalize:
        update = (update[0], *(orthogonal(u) for u in update[1:]))
    weights = tuple((1 - decay) * w + u for w, u in zip(state.weights, update, strict=True))
    moves = is_full if rule.per_token else rule.rebase_size is not None and place % rule.rebase_size == 0
    base = weights if moves else state.base
    return TitansState(weights, base, momentum, pending, gates, (place % rule.period,))


def _net(weights: Tensors, x: Tensor) -> Tensor:
    """f(x) for one token (H, F)."""
    z = x
    for index, weight in enumerate(weights[1:]):
        z = torch.einsum("hf,hfg->hg", F.gelu(z) if index else z, weight)
    return x + (1 + weights[0].squeeze(1)) * F.layer_norm(z, z.shape[-1:])


def _row(state: TitansState, n: int) -> TitansState:
    nets = [tuple(x[n] for x in net) for net in state[:4]]
    gates = None if state.gates is None else state.gates[n]
    return TitansState(nets[0], nets[1], nets[2], nets[3], gates, (state.position[n],))


def _gradients(weights: Tensors, key: Tensor, value: Tensor) -> Tensors:
    """Gradients of |f(k) - v|^2, themselves differentiable where a gradient is recorded."""
    outer = torch.is_grad_enabled()
    with nullcontext() if outer else torch.enable_grad():
        given = tuple(w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights)
        loss = (_net(given, key) - value).square().sum()
        found = torch.autograd.grad(loss, given, create_graph=outer)
    return found if outer else tuple(g.detach() for g in found)
