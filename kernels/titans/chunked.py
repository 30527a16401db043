"""The neural memory of Titans chunk by chunk (arXiv 2501.00663).

With gates per chunk, the gradients of a chunk make one sum and the net takes one step where the chunk ends.

With gates per token, every token reads a net of its own, which is never made: with a = 1 - decay and
e = momentum, the net after token t is

    M_t = (a_1 ... a_t) M_0 + R_t S_0 - sum_{i <= t} C_ti rate_i grad_i
    C_ti = sum_{s = i..t} (a_{s+1} ... a_t) (e_{i+1} ... e_s),   R_t likewise with e_1 ... e_s

and grad_i of a matrix is an outer product X_i^T G_i, so that to apply it to a row x takes products of tokens
only: x M_t = ... - sum_i C_ti rate_i (x . X_i) G_i.

The backward pass runs chunks again (`memzoo.kernels.grid_scan`).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid_scan import scan_grid
from ..linear_attention.log_sums import LogSums
from .nets import read, standardize, writes
from .types import Rule, Tensors, TitansState
from .update import advance

# Dimensions: M some sequences, H heads, C tokens of a chunk, F head width


def titans_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gates: Tensor,
    lengths: tuple[int, ...],
    rule: Rule,
    state: TitansState,
) -> tuple[Tensor, TitansState]:
    """Chunked form of `memzoo.kernels.titans`; arguments are already checked."""
    if not sum(lengths):
        return torch.zeros_like(q), state
    acc = state.weights[0].dtype
    rate, gates = rate.to(acc), gates.to(acc)
    tokens = [x.flatten(0, 1) for x in (q, k, v, rate)]
    if rule.per_token:
        # missing tokens are zeros: they write nothing, decay nothing and add no momentum to the net
        logs = torch.stack([F.logsigmoid(-gates[..., 0]), F.logsigmoid(gates[..., 1])], dim=-1)
        tokens += [logs.flatten(0, 1), torch.ones_like(rate[..., 0]).flatten()]
    else:
        moves = [
            float(rule.rebase_size is not None and (start + t + 1) % rule.rebase_size == 0)
            for start, length in zip(state.position, lengths, strict=True)
            for t in range(length)
        ]
        tokens += [gates.flatten(0, 1), torch.tensor(moves, dtype=acc, device=q.device)]
    step = _token_step if rule.per_token else _chunk_step
    output, found = scan_grid(
        partial(step, rule, len(state.weights), True),
        partial(step, rule, len(state.weights), False),
        _pack(state),
        tuple(tokens),
        (),
        lengths,
        tuple(n % rule.chunk_size for n in state.position),
        rule.chunk_size,
        num_lasting=len((*state.weights, *state.base, *state.momentum)),
    )
    ends = zip(state.position, lengths, strict=True)
    position = tuple((n + length) % rule.period for n, length in ends)
    return output.reshape(q.shape).to(q.dtype), _unpack(found, rule, len(state.weights), position)


def _pack(state: TitansState) -> Tensors:
    """All tensors of a state, one after the other."""
    gates = () if state.gates is None else (state.gates,)
    return (*state.weights, *state.base, *state.momentum, *state.pending, *gates)


def _unpack(tensors: Tensors, rule: Rule, size: int, position: tuple[int, ...] = ()) -> TitansState:
    """The state again, of nets with `size` tensors."""
    bounds = [size, size, size * rule.use_momentum, size * (not rule.per_token)]
    nets = []
    for length in bounds:
        nets.append(tensors[:length])
        tensors = tensors[length:]
    return TitansState(nets[0], nets[1], nets[2], nets[3], tensors[0] if tensors else None, position)


def _chunk_step(
    rule: Rule, size: int, is_part: bool, carried: Tensors, pieces: Tensors, constants: Tensors
) -> tuple[Tensor, Tensors]:
    """A chunk with one pair of gates."""
    state = _unpack(carried, rule, size)
    *heads, rate, gates, moves = pieces
    q, k, v = (x.transpose(1, 2).to(rate.dtype) for x in heads)  # (M, H, C, F)
    sums = writes(state.base, k, v, rule.loss_scale).sums(rate.transpose(1, 2)[..., None])
    total, logits = tuple(-s for s in sums), gates.sum(1)  # (M, H, 2)
    if is_part:
        assert state.gates is not None
        total = tuple(p + t for p, t in zip(state.pending, total, strict=True))
        logits = state.gates + logits
    closed, momentum = advance(state.weights, state.momentum, total, logits / rule.chunk_size, rule)
    output = torch.cat([read(state.weights, q[..., :-1, :]), read(closed, q[..., -1:, :])], dim=-2)
    base = state.base
    if rule.rebase_size is not None:
        is_moved = moves[:, -1, None, None, None] > 0
        base = tuple(torch.where(is_moved, w, b) for w, b in zip(closed, base, strict=True))
    if not is_part:
        return output.transpose(1, 2), _pack(TitansState(closed, base, momentum, (), None, ()))
    nothing = tuple(torch.zeros_like(p) for p in total)
    after = TitansState(closed, base, momentum, nothing, torch.zeros_like(logits), ())
    still_open = state._replace(pending=total, gates=logits)
    return output.transpose(1, 2), (*_pack(after), *_pack(still_open))


def _token_step(
    rule: Rule, size: int, is_part: bool, carried: Tensors, pieces: Tensors, constants: Tensors
) -> tuple[Tensor, Tensors]:
    """A chunk with gates per token."""
    state = _unpack(carried, rule, size)
    *heads, rate, logs, is_real = pieces
    q, k, v = (x.transpose(1, 2).to(rate.dtype) for x in heads)  # (M, H, C, F)
    rate = rate.transpose(1, 2)  # (M, H, C)
    decay, keep = (LogSums(x) for x in logs.permute(3, 0, 2, 1).unbind(0))
    found = writes(state.base, k, v, rule.loss_scale)

    reach = decay.between().tril()  # (M, H, C, C), C_ti
    from_start = decay.from_start()[..., None]  # (M, H, C, 1)
    momentum = state.momentum
    if rule.use_momentum:
        added = reach * is_real[:, None, None]
        kept = keep.between().tril()
        of_momentum = added @ keep.from_start()[..., None]  # (M, H, C, 1), R_t
        reach = added @ kept
        sums = found.sums((kept[..., -1, :] * rate)[..., None])
        last = keep.from_start()[..., -1:, None]
        momentum = tuple(last * s - u for s, u in zip(momentum, sums, strict=True))
    reach = reach * rate[..., None, :]

    x = q
    for index, (inputs, gradients) in enumerate(zip(found.inputs, found.gradients, strict=True)):
        x = F.gelu(x) if index else x
        z = from_start * (x @ state.weights[index + 1]) - (reach * (x @ inputs.mT)) @ gradients
        if rule.use_momentum:
            z = z + of_momentum * (x @ state.momentum[index + 1])
        x = z
    gain = from_start * state.weights[0] - reach @ found.gain  # (M, H, C, F)
    if rule.use_momentum:
        gain = gain + of_momentum * state.momentum[0]
    output = q + (1 + gain) * standardize(x)[0]

    sums = found.sums(reach[..., -1, :, None])
    weights = tuple(from_start[..., -1:, :] * w - u for w, u in zip(state.weights, sums, strict=True))
    if rule.use_momentum:
        weights = tuple(
            w + of_momentum[..., -1:, :] * s for w, s in zip(weights, state.momentum, strict=True)
        )
    after = TitansState(weights, weights, momentum, (), None, ())
    if not is_part:
        return output.transpose(1, 2), _pack(after)
    return output.transpose(1, 2), (*_pack(after), *_pack(after._replace(base=state.base)))
