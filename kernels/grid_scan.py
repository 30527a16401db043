"""Recurrences over chunks that lie on the token grid of each sequence, for calls that begin and end anywhere.

First comes the chunk that is open when the call begins, then all whole ones, then what is left. Sequences
share matmuls; one leaves when its chunks are done. The backward pass runs chunks again (`recompute`).
"""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import ChunkLayout
from .recompute import Step, Tensors, scan

# Dimensions: N sequences, M some of them, L tokens of all sequences, K chunks of the grid, S steps, C chunk
# length


def scan_grid(
    part: Step,
    whole: Step,
    carried: Tensors,
    tokens: Tensors,
    constants: Tensors,
    lengths: tuple[int, ...],
    positions: tuple[int, ...],
    chunk_size: int,
    *,
    num_lasting: int | None = None,
    is_ordered: bool = True,
    recompute: bool = True,
    group_size: int | None = None,
    forward: Step | None = None,
) -> tuple[Tensor, Tensors]:
    """Run a recurrence over chunks.

    Args:
        part: a step for a chunk of which tokens may be missing in front (earlier calls read them) or behind,
            on tensors (M, ...). What it carries out comes twice: first for a chunk that is full now, then for
            one that is still open. Missing tokens are zeros in all inputs.
        whole: a step for a full chunk that this call has alone; takes and carries out what lasts.
        carried: tensors (N, ...) before the call.
        tokens: (L, ...) each, of all sequences one after the other.
        constants: tensors that every step sees.
        lengths: tokens of each sequence.
        positions: of each sequence, tokens that earlier calls read of its open chunk.
        chunk_size: C.
        num_lasting: how many of the carried tensors, in front, outlive a chunk; the others are zeros when one
            begins. None for all.
        is_ordered: whether the place of a token in its chunk matters. If not, `part` is given no more slots
            than it needs.
        recompute, group_size, forward: see `scan`; of whole chunks, but for recompute.

    Returns:
        What the steps gave (M, C, ...), as (L, ...); and the tensors carried out. At least one token.
    """
    everyone = list(range(len(lengths)))
    ends = [place + length for place, length in zip(positions, lengths, strict=True)]
    phases = [place if length else 0 for place, length in zip(positions, lengths, strict=True)]
    slots = chunk_size
    if not is_ordered and max(ends) <= chunk_size:  # all tokens lie in the open chunks
        phases, slots = [0] * len(lengths), max(lengths)
    layout = ChunkLayout.make(lengths, slots, phases)
    grids = tuple(layout.to_chunks(x) for x in tokens)  # (K, C, ...)
    starts = list(accumulate(layout.num_chunks, initial=0))
    lasting = len(carried) if num_lasting is None else num_lasting
    # what is zero at the start of a chunk takes part in the first one where it has a gradient
    has_given = torch.is_grad_enabled() and any(x.requires_grad for x in carried[lasting:])
    is_open = [
        length > 0 and (has_given or place > 0 or length < chunk_size)
        for place, length in zip(positions, lengths, strict=True)
    ]
    counts = [
        max(end // chunk_size - opens, 0) if length else 0
        for length, end, opens in zip(lengths, ends, is_open, strict=True)
    ]
    done: list[Tensor] = []  # outputs (chunks, C, ...), and beside them the chunks they are of
    where: list[int] = []

    def take(rows: list[int]) -> Tensors:
        if rows == everyone:
            return carried
        index = torch.tensor(rows, device=carried[0].device)
        return tuple(x.index_select(0, index) for x in carried)

    def put(rows: list[int], found: Tensors) -> Tensors:
        if rows == everyone:
            return (*found, *carried[len(found) :])
        index = torch.tensor(rows, device=carried[0].device)
        given = zip(carried, found, strict=False)
        return (*(old.index_copy(0, index, new) for old, new in given), *carried[len(found) :])

    def run_part(rows: list[int], chunks: list[int], first: int, last: int) -> Tensors:
        """With the slots from `first` to `last`; what is carried on."""
        inputs = tuple(x[None, :, first:last] for x in _pick(grids, chunks))
        outputs, found = scan(part, take(rows), inputs, constants, recompute=recompute)
        missing = (first, slots - last)
        output = outputs[0]
        if any(missing):
            output = F.pad(output, (*[0, 0] * (output.dim() - 2), *missing))
        done.append(output)
        where.extend(chunks)
        full, still_open = found[: len(carried)], found[len(carried) :]
        is_full = [chunk < starts[n] + ends[n] // chunk_size for n, chunk in zip(rows, chunks, strict=True)]
        if all(is_full) or not any(is_full):
            return put(rows, full if is_full[0] else still_open)
        flags = torch.tensor(is_full, device=carried[0].device)
        pairs = zip(full, still_open, strict=True)
        return put(rows, tuple(torch.where(flags.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in pairs))

    def needed(first: int, last: int) -> tuple[int, int]:
        return (0, slots) if is_ordered else (first, min(last, slots))

    rows = [n for n in everyone if is_open[n]]
    if rows:
        bounds = needed(min(phases[n] for n in rows), max(phases[n] + lengths[n] for n in rows))
        carried = run_part(rows, [starts[n] for n in rows], *bounds)

    for rows, begin, end in _stretches(counts):
        chunks = [starts[n] + is_open[n] + step for step in range(begin, end) for n in rows]
        inputs = tuple(x.unflatten(0, (end - begin, len(rows))) for x in _pick(grids, chunks))
        outputs, found = scan(
            whole,
            take(rows)[:lasting],
            inputs,
            constants,
            recompute=recompute,
            group_size=group_size,
            forward=forward,
        )
        done.append(outputs.flatten(0, 1))
        where += chunks
        carried = put(rows, found)

    rows = [n for n, end in enumerate(ends) if lengths[n] and end > chunk_size and end % chunk_size]
    if rows:
        bounds = needed(0, max([ends[n] % chunk_size for n in rows]))
        carried = run_part(rows, [starts[n] + ends[n] // chunk_size for n in rows], *bounds)

    output = torch.cat(done)
    order = sorted(range(len(where)), key=where.__getitem__)
    if order != list(range(len(where))):
        output = output.index_select(0, torch.tensor(order, device=output.device))
    return layout.from_chunks(output), carried


def _stretches(counts: list[int]) -> list[tuple[list[int], int, int]]:
    """Which sequences have a whole chunk at steps `begin` to `end`, for all stretches."""
    places = sorted({0, *counts})
    return [
        ([n for n, count in enumerate(counts) if count >= end], begin, end) for begin, end in pairwise(places)
    ]


def _pick(grids: Tensors, chunks: list[int]) -> Tensors:
    """Some chunks of each grid."""
    if chunks == list(range(grids[0].shape[0])):
        return grids
    index = torch.tensor(chunks, device=grids[0].device)
    return tuple(x.index_select(0, index) for x in grids)
