"""Small steps of a bounded cache: which entries stay, which leave, what a new token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from .entries import Entries, LayerMemory, by_position

# Dimensions: B sequences with equally many tokens read, T tokens, H query heads, G key/value heads, R = H/G,
# n queries, C entries, D key width


def chosen(keep: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """Slots (B, G, n) of the entries to keep, by position, as many as the fullest head keeps; which count.

    Args:
        keep: (B, G, C) True where an entry stays.
    """
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    index = by_position(torch.where(keep, entries.order, 0))[..., :most]
    return index, keep.gather(-1, index)


def scattered(weights: Tensor, index: Tensor, num_slots: int) -> Tensor:
    """(B, G, R, n, C) attention weights of the entries of some slots (B, G, C'), zero for the others."""
    at = index[:, :, None, None].expand_as(weights)
    return weights.new_zeros(*weights.shape[:-1], num_slots).scatter(-1, at, weights)


def sentence_numbers(memory: LayerMemory, ends: Tensor) -> Tensor:
    """(B, T) int32 the sentences of new tokens: a prompt begins one, a single token may go on with one."""
    held = memory.entries.sentence
    assert held is not None
    assert memory.question is not None
    last = held.flatten(1).amax(-1, keepdim=True) if held.shape[2] else held.new_zeros(len(held), 1)
    begins = (
        memory.question[:, 0, -1:] == 0 if ends.shape[1] == 1 else torch.ones_like(last, dtype=torch.bool)
    )
    before = ends.cumsum(1) - ends.long()  # sentences that ended in this call
    return (last + begins + before).to(torch.int32)


def asked(memory: LayerMemory, q: Tensor, ends: Tensor) -> Tensor:
    """(B, G, D + 1) the question after new tokens; nothing is left of it behind a sentence or a prompt."""
    question = memory.question
    assert question is not None
    if q.shape[1] != 1:
        return torch.zeros_like(question)
    own = q[:, 0].detach().to(question.dtype).unflatten(1, (question.shape[1], -1)).mean(2)  # (B, G, D)
    grown = question + torch.cat([own, torch.ones_like(own[..., :1])], dim=-1)
    return grown.masked_fill(ends[:, :, None], 0)


def left_out(index: Tensor, keep: Tensor | None, entries: Entries) -> Entries:
    """The entries that are not among the slots `index`, in order."""
    stays = torch.zeros_like(entries.order)
    if keep is None:
        gone = stays.scatter(-1, index, 1).argsort(dim=-1, stable=True)
        return entries.take(gone[..., : entries.num_slots - index.shape[-1]])
    gone = stays.scatter(-1, index, keep.to(stays.dtype)) == 0
    order = torch.arange(entries.num_slots, device=gone.device).expand(gone.shape)
    return entries.take(order, gone)


def without(entries: Entries, budget: int, distance: int) -> Entries:
    """The entries without those that lie from slot `budget - distance` on, until the budget is kept."""
    slot, surplus = max(1, budget - distance), entries.num_slots - budget
    stays = torch.cat([torch.arange(slot), torch.arange(slot + surplus, entries.num_slots)])
    return entries.take(stays.to(entries.order.device).expand(*entries.order.shape[:2], -1))


def following(entries: Entries, leader: Tensor) -> Entries:
    """The entries of the positions that the first head of another layer holds."""
    wanted = leader[:, 0]  # (B, C')
    keep = (entries.order[:, :, :, None] == wanted[:, None, None]).any(-1) & entries.valid
    index = by_position(torch.where(keep, entries.order, 0))[..., : wanted.shape[-1]]
    return entries.take(index, keep.gather(-1, index))
