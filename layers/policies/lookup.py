"""Which of the entries held a single query reads: more may stay than any one token looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import Entries, by_position
from .selection import settled

# Dimensions: B sequences, T tokens, G key/value heads, C entries, D key width, X sentences


class Lookup:
    """Chooses, for every token read by itself, the entries that it sees.

    Attributes:
        budget: entries up to which it sees all that is held.
    """

    budget: int

    def ends(self, token_ids: Tensor) -> Tensor:
        """(B, T) bool from token ids (B, T): True where a sentence ends."""
        raise NotImplementedError(f"{type(self).__name__} does not implement ends")

    def slots(self, entries: Entries, question: Tensor) -> tuple[Tensor, Tensor] | None:
        """The slots (B, G, n) that a query reads, by position, and (B, G, n) which of them count.

        None where every row reads all it holds.

        Args:
            entries: sorted by position, empty slots last; the newest is that of the query.
            question: (B, G, D + 1) as in `LayerMemory`, the query included.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement slots")


@dataclass(frozen=True)
class Sentences(Lookup):
    """The sentences nearest to the question asked so far (SentenceKV, 2504.00970).

    A sentence is the set of its tokens that are held, its key their mean. The question is the mean of the
    queries since the last sentence ended, over the heads of a group. A query reads the first `start` entries
    held, the last `recent`, and tokens of the other finished sentences, those of the largest
    key . question first, until `budget` entries are found; the last token of a sentence and the first of the
    next read everything. So does every token while no more than `budget` entries are held.

    Attributes:
        boundary_ids: tokens that end a sentence.
        budget: entries that a query reads.
        start, recent: first and last entries held that it always reads.

    Raises:
        ValueError: no boundary ids, or a budget without room for sentences.
    """

    boundary_ids: tuple[int, ...]
    budget: int
    start: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if not self.boundary_ids:
            raise ValueError(
                "boundary_ids is empty, so no sentence would ever end. Give the ids of tokens such as a full "
                "stop and a line break."
            )
        if self.start < 0 or self.recent < 1 or self.start + self.recent >= self.budget:
            raise ValueError(
                f"a budget of {self.budget} entries leaves no room for sentences beside the first "
                f"{self.start} and the last {self.recent}. Raise it, or lower start (0 or more) and recent "
                "(1 or more)."
            )

    def ends(self, token_ids: Tensor) -> Tensor:
        return torch.isin(token_ids, torch.tensor(self.boundary_ids, device=token_ids.device))

    def slots(self, entries: Entries, question: Tensor) -> tuple[Tensor, Tensor] | None:
        assert entries.sentence is not None
        valid, sentence = entries.valid, entries.sentence.long()  # (B, G, C)
        is_first = question[:, :1, -1:] <= 1  # (B, 1, 1) nothing asked yet, or one token of it
        if entries.num_slots <= self.budget or bool(is_first.all()):
            return None
        rank, held = valid.cumsum(-1), valid.sum(-1, keepdim=True)
        is_near = (rank <= self.start) | (rank > held - self.recent)
        is_open = sentence == sentence.amax((1, 2), keepdim=True)  # the newest sentence has not ended
        order = self._order(entries, question).masked_fill(is_near | is_open | ~valid, entries.num_slots)
        place = order.sort(dim=-1, stable=True).indices.argsort(dim=-1)
        found = (place < self.budget - self.start - self.recent) & (order < entries.num_slots)
        seen = (is_near | found | is_first | (held <= self.budget)) & valid
        most = int(seen.sum(-1).max())
        index = by_position(torch.where(seen, entries.order, 0))[..., :most]
        return index, seen.gather(-1, index)

    @staticmethod
    def _order(entries: Entries, question: Tensor) -> Tensor:
        """(B, G, C) how many sentences are nearer to the question than that of each entry."""
        assert entries.sentence is not None
        sentence = entries.sentence.long()
        asked = question[..., :-1, None]  # (B, G, D, 1); its length changes no order
        product = (entries.key.detach().to(asked.dtype) @ asked).squeeze(-1)
        total = product.new_zeros(*sentence.shape[:2], int(sentence.max()) + 1)  # (B, G, X)
        size = total.scatter_add(-1, sentence, torch.ones_like(product))
        nearness = total.scatter_add(-1, sentence, product) / size.clamp(min=1)
        nearness = settled(nearness).masked_fill(size == 0, -torch.inf)
        ranked = nearness.sort(dim=-1, descending=True, stable=True).indices
        return ranked.argsort(dim=-1).gather(-1, sentence)
