"""A call taken apart at the boundaries of segments, for mixers that go from segment to segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import SequenceContext

# Dimensions: B batch, T tokens, N sequences, L tokens of all sequences


@dataclass(frozen=True)
class SegmentPieces:
    """Pieces of a call, in each of which every sequence has tokens of at most one segment of its own grid.

    Attributes:
        contexts: of the pieces, in order; they ask for the state. Sequences may be without tokens in a piece.
        places: (L',) of each piece, where its tokens lie in the packed row; None for a dense call, whose
            pieces are stretches of all rows.
    """

    contexts: tuple[SequenceContext, ...]
    places: tuple[Tensor, ...] | None

    @classmethod
    def make(cls, ctx: SequenceContext, segment_size: int) -> SegmentPieces:
        """The pieces of a call; none where it holds no token."""
        starts, lengths = ctx.starts, ctx.lengths
        if ctx.cu_seqlens is None and ctx.uniform_num_seen is not None:
            begin, end = starts[0], starts[0] + lengths[0]
            cuts = [t for t in range(begin + 1, end) if t % segment_size == 0]
            bounds = [begin, *cuts, end] if end > begin else [begin]
            contexts = []
            for first, last in zip(bounds, bounds[1:], strict=False):
                positions = ctx.positions[:, first - begin : last - begin]
                contexts.append(_context(ctx, positions, [first] * len(starts), [last - first] * len(starts)))
            return cls(tuple(contexts), None)
        contexts, places = [], []
        done = [0] * len(lengths)
        offsets = [sum(lengths[:n]) for n in range(len(lengths))]
        positions = ctx.positions.flatten()
        while sum(done) < sum(lengths):
            at = [start + count for start, count in zip(starts, done, strict=True)]
            sizes = [
                min(segment_size - place % segment_size, length - count)
                for place, length, count in zip(at, lengths, done, strict=True)
            ]
            stretches = zip(offsets, done, sizes, strict=True)
            where = torch.cat([torch.arange(o + count, o + count + size) for o, count, size in stretches])
            where = where.to(positions.device)
            contexts.append(_context(ctx, positions[where][None], at, sizes, is_packed=True))
            places.append(where)
            done = [count + size for count, size in zip(done, sizes, strict=True)]
        return cls(tuple(contexts), tuple(places))

    def split(self, x: Tensor) -> list[Tensor]:
        """The tokens of each piece, from x (B, T, ...): (B, T', ...), or (1, L', ...) where packed."""
        if self.places is None:
            return list(x.split([ctx.lengths[0] for ctx in self.contexts], dim=1))
        flat = x.flatten(0, 1)
        return [flat.index_select(0, place)[None] for place in self.places]

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The inverse of `split`, for parts of any width; `like` (B, T, ...) gives the shape."""
        if self.places is None:
            return torch.cat(list(parts), dim=1)
        order = torch.cat(self.places).argsort()
        joined = torch.cat([part[0] for part in parts]).index_select(0, order)
        return joined.reshape(*like.shape[:2], *joined.shape[1:])


def _context(
    ctx: SequenceContext, positions: Tensor, starts: list[int], lengths: list[int], *, is_packed: bool = False
) -> SequenceContext:
    bounds = torch.tensor([0, *lengths]).cumsum(0) if is_packed else None
    return dataclasses.replace(
        ctx,
        lengths=tuple(lengths),
        num_seen=torch.tensor(starts, dtype=torch.int64),
        uniform_num_seen=starts[0] if len(set(starts)) == 1 else None,
        positions=positions,
        input_shape=(positions.shape[0], positions.shape[1]),
        cu_seqlens=bounds,
        token_index=None,
        streams={},
        overrides={},
        return_state=True,
        return_extras=False,
        in_place=False,
        tables={},
    )
