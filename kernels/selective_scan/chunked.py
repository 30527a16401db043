"""Selective scan some tokens at a time: elementwise work on a whole chunk, a loop only for the recurrence.

For a chunk of C tokens the factors exp(delta_t A) and the writes (delta_t x_t) B_t^T are made at once, as
(C, ..., N, D) with the channels innermost, so that every operation runs over long rows. The recurrence is one
multiply-add per token in place, and one batched product reads all states of the chunk:

    S_t = W_t S_{t-1} + dx_t B_t^T,   y_t = S_t C_t,         W_t = exp(delta_t A),  dx_t = delta_t x_t

With Q_t the gradient of S_t, the backward pass goes through the chunks in reverse:

    Q_t = dy_t C_t^T + W_{t+1} Q_{t+1}     dC_t = S_t^T dy_t     dB_t = Q_t^T dx_t     d dx_t = Q_t B_t
    E_t = Q_t W_t S_{t-1}                  d delta_t = E_t A + x_t d dx_t         dA = sum_t delta_t E_t

It makes the states of a chunk again from the state that entered it. Those are all that is kept, and a chunk
has at least N tokens: memory is O(T D) whatever the size of the state. Exponents below a floor (a factor that
no sum of this precision can see) are raised to it, because denormal numbers are slow.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast

# Dimensions: B batch, T tokens, D channels, N state per channel, G groups of channels, E channels of a group,
# S sequences, R rows of a block, C chunk length, K chunks

# Numbers of one chunk of states (2 MiB of float32): small enough for the processor's cache.
CHUNK_NUMBERS = 2**19
# Numbers of the states of one block of rows, over which the loop over tokens is worth its overhead.
BLOCK_NUMBERS = 2**14


def exponent_floor(dtype: torch.dtype) -> float:
    """The smallest exponent whose factor is worth telling from zero."""
    return -700.0 if dtype == torch.float64 else -60.0


def selective_scan_torch(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Chunked form of `selective_scan_reference`."""
    groups = next((c.shape[2] for c in (B, C) if c.dim() == 4), 1)
    rates = _to_groups(A, groups)
    write, read = (c if c.dim() == 4 else _to_groups(c.to(A.dtype), groups) for c in (B, C))
    # a packed row has one segment per sequence, a dense batch one for all its rows
    bounds = [0, *accumulate(lengths)] if is_packed else [0, x.shape[1]]
    if chunk_size is None:
        numbers = A.numel() * _block_rows(x.shape[0], A.numel())
        chunk_size = max(A.shape[1], min(128, CHUNK_NUMBERS // max(1, numbers)))
    tensors = (x, delta, rates, write, read, _to_groups(state, groups))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    run = _scan_op if is_compiling() else _SelectiveScan.apply
    y, final, _ = run(*tensors, bounds, chunk_size, keep)
    return y, final.transpose(-1, -2).flatten(1, 2)


def _to_groups(x: Tensor, groups: int) -> Tensor:
    """(..., D, N) -> (..., G, N, E), the layout of the states in here."""
    return x.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous()


def _block_rows(num_rows: int, numbers: int) -> int:
    """Rows of a batch that are worked on together, for states of so many numbers."""
    return max(1, min(num_rows, BLOCK_NUMBERS // max(1, numbers)))


class _Job(NamedTuple):
    """A run of tokens of some rows: one loop of the recurrence."""

    rows: slice
    states: slice
    chunks: tuple[tuple[int, int, int], ...]  # (index of the kept state, first token, end) of each


def _jobs(num_rows: int, block_rows: int, bounds: Sequence[int], chunk_size: int) -> Iterator[_Job]:
    """All jobs of a call. With several rows there is one segment, with several segments one row."""
    first = 0
    for segment, (start, end) in enumerate(pairwise(bounds)):
        starts = range(start, end, chunk_size)
        chunks = tuple((first + i, t, min(t + chunk_size, end)) for i, t in enumerate(starts))
        first += len(chunks)
        for row in range(0, num_rows, block_rows):
            stop = min(row + block_rows, num_rows)
            yield _Job(slice(row, stop), slice(segment + row, segment + stop), chunks)


class _Scratch:
    """Memory for the numbers (C, R, G, N, E) of one chunk, used again for each."""

    def __init__(self, count: int, x: Tensor, A: Tensor, bounds: Sequence[int], chunk_size: int):
        longest = max((end - start for start, end in pairwise(bounds)), default=0)
        self.block_rows = _block_rows(x.shape[0], A.numel())
        shape = (min(chunk_size, longest), self.block_rows, *A.shape)
        self._buffers = [A.new_empty(shape) for _ in range(count)]

    def take(self, length: int, num_rows: int) -> list[Tensor]:
        """Contiguous pieces of the size of a chunk."""
        shape = (length, num_rows, *self._buffers[0].shape[2:])
        return [buffer.flatten()[: math.prod(shape)].view(shape) for buffer in self._buffers]


class _Chunk:
    """The inputs of one chunk in the accumulation dtype, laid out for products with (C, R, G, N, E)."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        write: Tensor,
        read: Tensor,
        job: _Job,
        t0: int,
        t1: int,
    ):
        self.job, self.tokens, self.A = job, slice(t0, t1), A
        self.x, self.delta = self.channels(x), self.channels(delta)  # (C, R, G, 1, E)
        self.dx = self.x * self.delta
        self.write, self.read = self._coefficient(write), self._coefficient(read)

    def channels(self, x: Tensor) -> Tensor:
        """The part (R, C, D) of a tensor (B, T, D) as (C, R, G, 1, E)."""
        part = x[self.job.rows, self.tokens].to(self.A.dtype).transpose(0, 1).contiguous()
        return part.unflatten(2, (self.A.shape[0], 1, -1))

    def put(self, place: Tensor, part: Tensor) -> None:
        """The inverse of `channels`: writes (C, R, G, 1, E) into (B, T, D)."""
        place[self.job.rows, self.tokens] = part.flatten(2).transpose(0, 1)

    def put_coefficient(self, place: Tensor, part: Tensor) -> None:
        """Writes the gradient of a coefficient; that of a constant one is a sum over tokens."""
        if place.dim() == 3:
            place += part
        else:
            place[self.job.rows, self.tokens] = part[..., 0].transpose(0, 1)

    def _coefficient(self, x: Tensor) -> Tensor:
        """(B, T, G, N) -> (C, R, G, N, 1); a constant (G, N, E) stays as it is."""
        if x.dim() == 3:
            return x
        return x[self.job.rows, self.tokens].to(self.A.dtype).transpose(0, 1)[..., None]

    def run(self, decay: Tensor, states: Tensor, start: Tensor, slowest: float | None) -> None:
        """Fills the factors and the states of the chunk, given the state (R, G, N, E) that enters it.

        `slowest` is the lowest rate where the device can be asked for free, else None.
        """
        torch.mul(self.delta, self.A, out=decay)
        floor = exponent_floor(decay.dtype)
        if slowest is None or float(self.delta.amax()) * slowest < floor:
            decay.clamp_(min=floor)
        decay.exp_()
        torch.mul(self.dx, self.write, out=states)
        last = start
        for factor, state in zip(decay.unbind(), states.unbind(), strict=True):
            last = state.addcmul_(factor, last)


def _sum_over_states(states: Tensor, coefficient: Tensor) -> Tensor:
    """(C, R, G, N, E) times a coefficient, summed over N: (C, R, G, 1, E)."""
    if coefficient.dim() == 3:
        return (states * coefficient).sum(3, keepdim=True)
    return coefficient.transpose(3, 4) @ states


def _coefficient_gradient(states: Tensor, channels: Tensor, coefficient: Tensor) -> Tensor:
    """(C, R, G, N, E) times (C, R, G, 1, E), summed to the shape of a coefficient."""
    if coefficient.dim() == 3:
        return (states * channels).sum((0, 1))
    return states @ channels.transpose(3, 4)


def _slowest(A: Tensor) -> float | None:
    return float(A.amin()) if A.device.type == "cpu" and A.numel() else None


def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    start: Tensor,
    bounds: Sequence[int],
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), final states (S, G, N, E), and the states (K, B, G, N, E) entering chunks if `keep`."""
    y, final, entries = _empty_results(x, delta, A, write, read, start, bounds, chunk_size, keep)
    final.copy_(start)
    scratch = _Scratch(2, x, A, bounds, chunk_size)
    slowest = _slowest(A)
    for job in _jobs(x.shape[0], scratch.block_rows, bounds, chunk_size):
        state = final[job.states]  # (R, G, N, E)
        for index, t0, t1 in job.chunks:
            chunk = _Chunk(x, delta, A, write, read, job, t0, t1)
            if keep:
                entries[index, job.rows] = state
            decay, states = scratch.take(t1 - t0, state.shape[0])
            chunk.run(decay, states, state, slowest)
            chunk.put(y, _sum_over_states(states, chunk.read))
            state.copy_(states[-1])
    return y, final, entries


def _scan_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    entries: Tensor,
    d_y: Tensor,
    d_final: Tensor,
    bounds: Sequence[int],
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, write, read and start."""
    dx, d_delta = torch.empty_like(x), torch.empty_like(delta)
    d_write, d_read = torch.zeros_like(write), torch.zeros_like(read)
    d_start = d_final.clone()
    scratch = _Scratch(3, x, A, bounds, chunk_size)
    dA_rows = A.new_zeros(scratch.block_rows, *A.shape)  # (R, G, N, E)
    slowest = _slowest(A)
    for job in _jobs(x.shape[0], scratch.block_rows, bounds, chunk_size):
        d_state = d_start[job.states]  # (R, G, N, E)
        num_rows = d_state.shape[0]
        for index, t0, t1 in reversed(job.chunks):
            chunk = _Chunk(x, delta, A, write, read, job, t0, t1)
            entry = entries[index, job.rows]
            decay, states, grads = scratch.take(t1 - t0, num_rows)
            chunk.run(decay, states, entry, slowest)
            d_out = chunk.channels(d_y)
            torch.mul(d_out, chunk.read, out=grads)
            # from here on `decay` turns, token by token, into W_t Q_t
            later = d_state
            for factor, grad in zip(reversed(decay.unbind()), reversed(grads.unbind()), strict=True):
                later = factor.mul_(grad.add_(later))
            d_state.copy_(later)
            chunk.put_coefficient(d_read, _coefficient_gradient(states, d_out, chunk.read))
            chunk.put_coefficient(d_write, _coefficient_gradient(grads, chunk.dx, chunk.write))
            d_dx = _sum_over_states(grads, chunk.write)
            chunk.put(dx, d_dx * chunk.delta)
            exponents = decay  # E of the module docstring
            exponents[1:].mul_(states[:-1])
            exponents[0].mul_(entry)
            step = d_dx.mul_(chunk.x).squeeze(3)  # (C, R, G, E)
            for exponent, rate in zip(exponents.unbind(3), A.unbind(1), strict=True):
                step.addcmul_(exponent, rate)
            chunk.put(d_delta, step)
            for exponent, delta_t in zip(exponents.unbind(), chunk.delta.unbind(), strict=True):
                dA_rows[:num_rows].addcmul_(exponent, delta_t)
    return dx, d_delta, dA_rows.sum(0), d_write, d_read, d_start


class _SelectiveScan(torch.autograd.Function):
    """`_scan` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = _scan(*arguments)
        ctx.mark_non_differentiable(results[2])
        ctx.set_materialize_grads(False)
        _save(ctx, arguments, results)
        return results

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_y, d_final, _ = grads
        x, delta, A, write, read, entries = ctx.saved_tensors
        d_y = A.new_zeros(x.shape) if d_y is None else d_y
        d_final = A.new_zeros(ctx.num_sequences, *A.shape) if d_final is None else d_final
        found = _scan_backward(x, delta, A, write, read, entries, d_y, d_final, ctx.bounds, ctx.chunk_size)
        return *found, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, start, ctx.bounds, ctx.chunk_size, _ = inputs
    ctx.num_sequences = start.shape[0]
    ctx.save_for_backward(*tensors, output[2])


def _empty_results(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    start: Tensor,
    bounds: Sequence[int],
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_chunks = sum(-(-(end - begin) // chunk_size) for begin, end in pairwise(bounds)) if keep else 0
    return (
        torch.empty_like(x, dtype=A.dtype),
        torch.empty_like(start),
        A.new_empty(num_chunks, x.shape[0], *A.shape),
    )


# Under torch.compile the loop over tokens is one opaque operation: unrolled it would take minutes to compile.
_scan_op = torch.library.custom_op(
    "memzoo::selective_scan",
    _scan,
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor write, Tensor read, Tensor start, SymInt[] bounds, "
    "SymInt chunk_size, bool keep) -> (Tensor, Tensor, Tensor)",
)
_scan_backward_op = torch.library.custom_op(
    "memzoo::selective_scan_backward",
    _scan_backward,
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor write, Tensor read, Tensor entries, Tensor d_y, "
    "Tensor d_final, SymInt[] bounds, SymInt chunk_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_scan_op.register_fake(_empty_results)


@_scan_backward_op.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    write: Tensor,
    read: Tensor,
    entries: Tensor,
    d_y: Tensor,
    d_final: Tensor,
    bounds: Sequence[int],
    chunk_size: int,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, delta, A, write, read, d_final))


def _op_backward(ctx: Any, d_y: Tensor, d_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _scan_backward_op(*ctx.saved_tensors, d_y, d_final, ctx.bounds, ctx.chunk_size)
    return *found, None, None, None


_scan_op.register_autograd(_op_backward, setup_context=_save)
