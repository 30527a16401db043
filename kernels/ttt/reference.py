"""Test-time training by the definition, token by token (Sun et al., arXiv 2407.04620).

With W the fast weights at the start of a mini-batch and i the place of token t in it,

    P_i = P_{i-1} + rate_t * gradient of 1/2 |f(k_t; W) - v_t|^2 by W,   P = 0 before the mini-batch
    o_t = f(q_t; W - reader_rate_i P_i)
    W   <- W - reader_rate_last P_last   after its last token

The gradient is left to autograd.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import TTTState

# Dimensions: N sequences, H heads, C tokens of a mini-batch, F head width

Tensors = tuple[Tensor, ...]


def ttt_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    reader_rate: Tensor,
    norm: tuple[Tensor, Tensor],
    lengths: tuple[int, ...],
    *,
    eps: float,
    state: TTTState,
) -> tuple[Tensor, TTTState]:
    """The definition of `memzoo.kernels.ttt`; arguments are already checked."""
    acc = state.weights[0].dtype
    rows = [x.to(acc).flatten(0, 1).split(list(lengths)) for x in (q, k, v, rate)]
    reader_rate = reader_rate.to(acc)
    gamma, beta = (x.to(acc) for x in norm)  # (H, F)
    size = len(reader_rate)

    def net(x: Tensor, weights: Tensors) -> Tensor:
        """f(x) for one token (H, F)."""
        z = torch.einsum("hf,hfg->hg", x, weights[0]) + weights[1].squeeze(1)
        if len(weights) == 4:
            z = torch.einsum("hg,hgf->hf", F.gelu(z, approximate="tanh"), weights[2]) + weights[3].squeeze(1)
        return x + F.layer_norm(z, z.shape[-1:], eps=eps) * gamma + beta

    outputs: list[Tensor] = []
    finals: list[tuple[Tensors, Tensors]] = []
    positions = list(state.position)
    for n, length in enumerate(lengths):
        weights = tuple(w[n] for w in state.weights)
        pending = tuple(p[n] for p in state.pending)
        for t in range(length):
            q_t, k_t, v_t, rate_t = (x[n][t] for x in rows)
            gradients = _gradients(lambda w, k_t=k_t, v_t=v_t: 0.5 * (net(k_t, w) - v_t).square(), weights)
            pending = tuple(p + rate_t[:, None, None] * g for p, g in zip(pending, gradients, strict=True))
            place = positions[n]
            seen = tuple(w - reader_rate[place] * p for w, p in zip(weights, pending, strict=True))
            outputs.append(net(q_t, seen))
            positions[n] += 1
            if positions[n] == size:
                weights, pending = seen, tuple(torch.zeros_like(p) for p in pending)
                positions[n] = 0
        finals.append((weights, pending))
    output = torch.stack(outputs).reshape(q.shape) if outputs else torch.zeros_like(q)
    final = [tuple(torch.stack(x) for x in zip(*parts, strict=True)) for parts in zip(*finals, strict=True)]
    return output.to(q.dtype), TTTState(final[0], final[1], tuple(positions))


def _gradients(loss, weights: Tensors) -> Tensors:  # type: ignore[no-untyped-def]
    """Gradients of the sum of a loss, themselves differentiable where a gradient is recorded."""
    outer = torch.is_grad_enabled()
    with nullcontext() if outer else torch.enable_grad():
        given = tuple(w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights)
        found = torch.autograd.grad(loss(given).sum(), given, create_graph=outer)
    return found if outer else tuple(g.detach() for g in found)
