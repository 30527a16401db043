"""Which entries stay where the answer is more than "the best of every head"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import Entries

# Dimensions: B sequences, G key/value heads, C entries


def settled(scores: Tensor) -> Tensor:
    """Scores without their last bits: of two that differ by rounding alone the lower position wins.

    Equal tokens at different places have keys of the same length, but for the rounding of their rotation.
    """
    mantissa, exponent = torch.frexp(scores)
    scale = 2.0 ** (40 if scores.dtype == torch.float64 else 16)
    kept = (mantissa * scale).round() / scale * torch.exp2(exponent.to(scores.dtype))
    return torch.where(scores.isinf(), scores, kept)


class Selector:
    """Chooses from scores; heads may end with unequal numbers of entries."""

    @property
    def spans_layers(self) -> bool:
        """Whether all layers of a model are looked at together (`share`)."""
        return False

    def check(self, forced: int, budget: int) -> None:
        """Raises ValueError where a budget has no room for so many forced entries of a head."""

    def share(self, scores: Sequence[Tensor], budgets: Sequence[int]) -> list[Tensor]:
        """What `keep` gives, for every layer of a model.

        Args:
            scores: (B, G, C) of each layer; C may differ.
            budgets: entries of a head of each layer on average.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement share")

    def width(self, budget: int, num_groups: int, num_layers: int = 1) -> int:
        """The most entries that one head may keep."""
        raise NotImplementedError(f"{type(self).__name__} does not implement width")

    def mean_width(self, budget: int) -> int:
        """The most entries that heads keep on average."""
        return budget

    def keep(self, scores: Tensor, entries: Entries, budget: int) -> Tensor:
        """(B, G, C) True where an entry stays.

        Args:
            scores: (B, G, C), +inf where an entry must stay, -inf in empty slots.
            entries: what is scored, sorted by position, empty slots last.
            budget: entries of a head on average.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement keep")


@dataclass(frozen=True)
class HeadAdaptive(Selector):
    """Heads with higher scores keep more (AdaKV, Feng et al., 2407.11550).

    The scores of a layer are compared over its heads; every head first keeps its own best share.

    Attributes:
        safeguard: that share of the budget, at least one entry.
    """

    safeguard: float = 0.2

    def width(self, budget: int, num_groups: int, num_layers: int = 1) -> int:
        return num_groups * budget - (num_groups - 1) * self._safe(budget)

    def keep(self, scores: Tensor, entries: Entries, budget: int) -> Tensor:
        num_groups, num_entries = scores.shape[1:]
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        own = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., : self._safe(budget)], True)
        pooled = scores.masked_fill(own & (scores > -torch.inf), torch.inf).flatten(1)  # (B, G C)
        best = pooled.argsort(dim=-1, descending=True, stable=True)[:, : num_groups * budget]
        keep = torch.zeros_like(pooled, dtype=torch.bool).scatter(-1, best, True)
        return keep.unflatten(1, (num_groups, num_entries)) & (scores > -torch.inf)

    def _safe(self, budget: int) -> int:
        return max(1, int(budget * self.safeguard))


@dataclass(frozen=True)
class WholeWindows(Selector):
    """Windows of consecutive entries stay or go as a whole, in all heads alike (WindowKV, 2503.17922).

    The budget counts the entries before the suffix; the suffix always stays. The scorer gives all entries of
    a window the score of the window.

    Attributes:
        window: entries of a window.
        suffix: last tokens that are no part of a window.
    """

    window: int = 8
    suffix: int = 32

    def width(self, budget: int, num_groups: int, num_layers: int = 1) -> int:
        return self.mean_width(budget)

    def mean_width(self, budget: int) -> int:
        return budget + self.suffix

    def keep(self, scores: Tensor, entries: Entries, budget: int) -> Tensor:
        review = scores.shape[-1] - self.suffix
        keep = torch.ones_like(scores, dtype=torch.bool)
        if review <= budget:
            return keep
        rated = scores[:, 0, : review : self.window]  # (B, windows)
        num_dropped = -(-(review - budget) // self.window)
        # of equal windows the earlier stays
        order = rated.argsort(dim=-1, descending=True, stable=True)
        stays = torch.ones_like(rated, dtype=torch.bool)
        stays = stays.scatter(-1, order[:, rated.shape[-1] - num_dropped :], False)
        by_token = stays.repeat_interleave(self.window, dim=-1)[:, :review]  # (B, review)
        keep[..., :review] = by_token[:, None]
        return keep


@dataclass(frozen=True)
class GlobalBudget(Selector):
    """All heads of all layers share one budget by their scores (TRIM-KV, 2512.03324; DBTrimKV, 2605.09649).

    A head keeps int(floor M) entries, and as many more as it has among the best of the rest of the pool, M
    being the average budget of its layer: the counts follow from the scores of all, which of its entries a
    head keeps from its own.

    Attributes:
        floor: share of the budget that every head keeps.
        threshold: entries of a score below log(threshold) leave although there is room; None keeps them. With
            retention gates it is what is left of a token.

    Raises:
        ValueError: a floor outside [0, 1], or a threshold outside (0, 1].
    """

    floor: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}. It is a share of the budget.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold must lie in (0, 1], got {self.threshold}. It is what is left of a token."
            )

    @property
    def spans_layers(self) -> bool:
        return True

    def check(self, forced: int, budget: int) -> None:
        room = budget - int(budget * self.floor)
        if forced > room:
            raise ValueError(
                f"a budget of {budget} entries of which every head keeps {budget - room} has no room for "
                f"{forced} sinks and recent tokens. Raise the budget or lower the others."
            )

    def width(self, budget: int, num_groups: int, num_layers: int = 1) -> int:
        return num_layers * num_groups * budget - (num_layers * num_groups - 1) * int(budget * self.floor)

    def keep(self, scores: Tensor, entries: Entries, budget: int) -> Tensor:
        return self.share([scores], [budget])[0]

    def share(self, scores: Sequence[Tensor], budgets: Sequence[int]) -> list[Tensor]:
        own = [int(budget * self.floor) for budget in budgets]
        heads = [layer.shape[1] for layer in scores]
        pool = sum(n * (budget - least) for n, budget, least in zip(heads, budgets, own, strict=True))
        flat = torch.cat([layer.flatten(1) for layer in scores], dim=1)  # (B, entries of all layers)
        best = flat.argsort(dim=-1, descending=True, stable=True)[:, :pool]
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, best, True) & (flat > -torch.inf)
        if self.threshold is not None:
            chosen &= flat >= math.log(self.threshold)
        kept = []
        for layer, part, least in zip(
            scores, chosen.split([layer[0].numel() for layer in scores], dim=1), own, strict=True
        ):
            count = part.view(layer.shape).sum(-1, keepdim=True) + least  # (B, G, 1)
            rank = layer.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            kept.append((rank < count) & (layer > -torch.inf))
        return kept
