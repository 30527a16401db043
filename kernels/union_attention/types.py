"""What the union softmax takes and returns besides tensors."""

from typing import NamedTuple

from torch import Tensor

# Dimensions: K tiles, C queries of a tile, J slots of a tile, P slots of a pool, H query heads, G key/value
# heads, D key width, E value width


class SlotStream(NamedTuple):
    """One memory that the queries of some tiles look at: slots in any order, each seen by a run of queries.

    Attributes:
        q: (K, C, H, D) the queries, as this memory wants them (rotated, or of a projection of its own).
        k: (K, J, G, D) keys of each tile, or with `place` a pool (P, G, D) that all tiles share.
        v: (K, J, G, E) or (P, G, E).
        place: (K, J) int64, index of each slot in the pool; a negative one is an empty slot.
        first, last: (K, J) int64, numbers of the first and last query of the tile that see the slot; an empty
            range hides it. None for all queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    place: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None

    @property
    def num_slots(self) -> int:
        """J."""
        return self.k.shape[1] if self.place is None else self.place.shape[1]

    def rows(self, start: int, end: int) -> "SlotStream":
        """The tiles from `start` to `end`."""
        cut = [None if x is None else x[start:end] for x in (self.place, self.first, self.last)]
        if self.place is None:
            return SlotStream(self.q[start:end], self.k[start:end], self.v[start:end], *cut)
        return SlotStream(self.q[start:end], self.k, self.v, *cut)


class UnionOutput(NamedTuple):
    """Result of a union softmax.

    Attributes:
        output: in the dtype of the queries; zeros where a query sees nothing.
        lse: logsumexp of the scaled logits of the visible keys, -inf where there are none; float32, or
            float64 for float64 input.
    """

    output: Tensor
    lse: Tensor
