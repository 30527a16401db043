"""Attention over the entries of a bounded cache, and what a scorer may know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.autograd import without_autocast
from .entries import Entries

# Dimensions: B sequences, n queries, H query heads, G key/value heads, R = H/G queries heads per key head, C
# entries, D key width, E value width, W queries of the observation window

MAX_WEIGHTS = 1 << 22  # attention weights that are alive at a time
MIN_LOGIT = -1e30  # of entries that no query sees; finite, so that a query without entries reads zeros


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what accumulates: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor,
    entries: Entries,
    query_order: Tensor,
    *,
    scale: float,
    observe: Callable[[Tensor], None] | None = None,
    mass_correction: bool = False,
    rotation: Tensor | None = None,
) -> Tensor:
    """Softmax attention of queries over entries; one softmax, in float32 or wider.

    Args:
        q: (B, n, H, D), rotated.
        entries: what may be seen; a query sees the valid entries up to its own position.
        query_order: (n,) position + 1 of each query.
        scale: factor of the logits.
        observe: told the weights (B, G, R, n', C) of a block of queries after another.
        mass_correction: adds ln(count) to the logits of entries that stand for several tokens.
        rotation: (D'/2,) rotary frequencies; keys and queries are then turned to their rank among the valid
            entries (StreamingLLM's positions), D' <= D being the rotated width.

    Returns:
        (B, n, H, E) in the dtype of q.
    """
    batch, length, num_heads, _ = q.shape
    wide, groups = wide_dtype(q.dtype), entries.key.shape[1]
    with without_autocast(q.device):
        key, value = entries.key.to(wide), entries.value.to(wide)
        queries = q.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B, G, R, n, D)
        if rotation is not None:
            queries, key = _to_ranks(queries, key, entries, query_order, rotation)
        bias = torch.zeros_like(entries.order, dtype=wide)  # (B, G, C)
        if mass_correction and entries.count is not None:
            bias = entries.count.clamp(min=1).to(wide).log()
        block = max(1, MAX_WEIGHTS // max(1, batch * num_heads * entries.num_slots))
        outputs = []
        for first in range(0, length, block):
            part = queries[:, :, :, first : first + block]  # (B, G, R, n', D)
            seen_by = query_order[first : first + block]
            # (B, G, R n', D) x (B, G, D, C)
            logits = (part.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, part.shape[2:4]) * scale
            order = entries.order[:, :, None, None]  # (B, G, 1, 1, C)
            hidden = (order > seen_by[:, None]) | (order == 0)
            logits = (logits + bias[:, :, None, None]).masked_fill(hidden, MIN_LOGIT)
            weights = logits.softmax(-1).masked_fill(hidden, 0.0)
            if observe is not None:
                observe(weights.detach())
            outputs.append((weights.flatten(2, 3) @ value).unflatten(2, part.shape[2:4]))
        out = torch.cat(outputs, dim=3) if outputs else queries[..., :0]
        if not outputs:
            return q.new_zeros(batch, 0, num_heads, entries.value.shape[-1])
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


@dataclass(frozen=True)
class Observation:
    """What a scorer may look at besides the entries.

    Attributes:
        num_seen: tokens each sequence has read, those in the entries included.
        scale: factor of the logits.
        queries: (B, W', H, D) the last queries, the newest last: those of the part of the call that ends
            here, or the last `window` of the scorer where these are more.
        num_new: queries of the part of the call that ends here.
        layer, num_layers: index of the layer in its model, and how many there are.
        group_reduce: "mean" or "max" over the query heads of a key/value head.
    """

    num_seen: int
    scale: float
    queries: Tensor
    num_new: int = 1
    layer: int = 0
    num_layers: int = 1
    group_reduce: str = "mean"

    def attention(self, entries: Entries, window: int) -> Tensor:
        """(B, H, W, C) attention of the last `window` queries over the entries, causal, over all of them."""
        found: list[Tensor] = []
        self.weigh(entries, window, found.append)
        return torch.cat(found, dim=3).flatten(1, 2)

    def sums(self, entries: Entries, window: int, power: int = 1) -> Tensor:
        """(B, H, C) sum over the last `window` queries of their attention, to a power."""
        found: list[Tensor] = []

        def add(weights: Tensor) -> None:
            total = weights.pow(power).sum(3).flatten(1, 2)
            found[:] = [found[0] + total] if found else [total]

        self.weigh(entries, window, add)
        return found[0]

    def weigh(self, entries: Entries, window: int, observe: Callable[[Tensor], None]) -> None:
        """Tells `observe` the weights (B, G, R, n', C) of the last `window` queries, block by block."""
        queries = self.queries[:, -window:]
        first = self.num_seen - queries.shape[1] + 1
        order = torch.arange(first, self.num_seen + 1, device=queries.device)
        # the values are not needed: one column of them makes the product small
        narrow = Entries(entries.key, entries.value[..., :1], entries.order)
        with torch.no_grad():
            attend(queries, narrow, order, scale=self.scale, observe=observe)

    def reduce_group(self, per_query_head: Tensor, num_groups: int) -> Tensor:
        """(B, H, C) -> (B, G, C)."""
        grouped = per_query_head.unflatten(1, (num_groups, -1))
        return grouped.mean(2) if self.group_reduce == "mean" else grouped.amax(2)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turns x (..., D) by angles (..., D'/2), half-split convention, D' <= D; the rest stays."""
    width = 2 * angle.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rerotate_keys(key: Tensor, old_pos: Tensor, new_pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys rotated to old positions, turned to new ones.

    Args:
        key: (..., C, D).
        old_pos, new_pos: (..., C) integers.
        inv_freq: (D'/2,) rotary frequencies.
    """
    wide = wide_dtype(key.dtype)
    angle = (new_pos - old_pos).to(wide)[..., None] * inv_freq.to(wide)
    return rotate(key.to(wide), angle).to(key.dtype)


def _to_ranks(
    queries: Tensor, key: Tensor, entries: Entries, query_order: Tensor, inv_freq: Tensor
) -> tuple[Tensor, Tensor]:
    valid = entries.valid
    rank = valid.cumsum(-1) - 1  # (B, G, C)
    key = rerotate_keys(key, torch.where(valid, entries.pos, rank), rank, inv_freq)
    seen = (valid[:, :, None] & (entries.order[:, :, None] <= query_order[:, None])).sum(-1)  # (B, G, n)
    # the query stands where its own key does
    turn = (seen - query_order)[:, :, None]  # (B, G, 1, n)
    angle = turn.to(queries.dtype)[..., None] * inv_freq.to(queries.dtype)
    return rotate(queries, angle), key
