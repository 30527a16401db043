"""Recurrences over chunks that lie on the token grid of each sequence, for calls that begin and end anywhere.

First comes the chunk that is open when the call begins, then all whole ones, then what is left. Sequences
share matmuls; one leaves when its chunks are done. The backward pass runs chunks again (`recompute`).
"""

from itertools import accumulate, pairwise

import torch
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
) -> tuple[Tensor, Tensors]:
    """Run a recurrence over chunks.

    Args:
        part: a step for a chunk of which tokens may be missing in front (earlier calls read them) or behind,
            on tensors (M, ...). What it carries out comes twice: first for a chunk that is full now, then for
            one that is still open. Missing tokens are zeros in all inputs.
        whole: a step for a full chunk that this call has alone; carries out what it was given, once.
        carried: tensors (N, ...) before the call.
        tokens: (L, ...) each, of all sequences one after the other.
        constants: tensors that every step sees.
        lengths: tokens of each sequence.
        positions: of each sequence, tokens that earlier calls read of its open chunk.
        chunk_size: C.

    Returns:
        What the steps gave (M, C, ...), as (L, ...); and the tensors carried out. At least one token.
    """
    phases = [place if length else 0 for place, length in zip(positions, lengths, strict=True)]
    layout = ChunkLayout.make(lengths, chunk_size, phases)
    grids = tuple(layout.to_chunks(x) for x in tokens)  # (K, C, ...)
    rows_of = [tuple(parts) for parts in zip(*(x.unbind(0) for x in carried), strict=True)]
    starts = list(accumulate(layout.num_chunks, initial=0))
    ends = [place + length for place, length in zip(positions, lengths, strict=True)]
    done: list[Tensor] = []  # outputs (chunks, C, ...), and beside them the chunks they are of
    where: list[int] = []

    def run_part(rows: list[int], chunks: list[int]) -> None:
        if not rows:
            return
        inputs = tuple(x[None] for x in _pick(grids, chunks))
        outputs, found = scan(part, _stack(rows_of, rows), inputs, constants)
        done.append(outputs[0])
        where.extend(chunks)
        for m, n in enumerate(rows):
            is_full = chunks[m] < starts[n] + ends[n] // chunk_size
            rows_of[n] = tuple(x[m] for x in (found[: len(carried)] if is_full else found[len(carried) :]))

    rows = [n for n, length in enumerate(lengths) if length]
    run_part(rows, [starts[n] for n in rows])

    counts = [
        max(end // chunk_size - 1, 0) if length else 0 for length, end in zip(lengths, ends, strict=True)
    ]
    for rows, begin, end in _stretches(counts):
        chunks = [starts[n] + 1 + step for step in range(begin, end) for n in rows]
        inputs = tuple(x.unflatten(0, (end - begin, len(rows))) for x in _pick(grids, chunks))
        outputs, found = scan(whole, _stack(rows_of, rows), inputs, constants)
        done.append(outputs.flatten(0, 1))
        where += chunks
        for m, n in enumerate(rows):
            rows_of[n] = tuple(x[m] for x in found)

    rows = [n for n, end in enumerate(ends) if end > chunk_size and end % chunk_size]
    run_part(rows, [starts[n] + 1 + counts[n] for n in rows])

    output = torch.cat(done)
    order = sorted(range(len(where)), key=where.__getitem__)
    if order != list(range(len(where))):
        output = output.index_select(0, torch.tensor(order, device=output.device))
    return layout.from_chunks(output), _stack(rows_of, list(range(len(lengths))))


def _stretches(counts: list[int]) -> list[tuple[list[int], int, int]]:
    """Which sequences have a whole chunk at steps `begin` to `end`, for all stretches."""
    places = sorted({0, *counts})
    return [
        ([n for n, count in enumerate(counts) if count >= end], begin, end) for begin, end in pairwise(places)
    ]


def _stack(parts: list[Tensors], rows: list[int]) -> Tensors:
    """Tensors (M, ...) of some sequences from those of each."""
    return tuple(torch.stack(x) for x in zip(*(parts[n] for n in rows), strict=True))


def _pick(grids: Tensors, chunks: list[int]) -> Tensors:
    """Some chunks of each grid."""
    if chunks == list(range(grids[0].shape[0])):
        return grids
    index = torch.tensor(chunks, device=grids[0].device)
    return tuple(x.index_select(0, index) for x in grids)
