"""How a budget is shared among the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import Entries
from .reading import Observation

# Dimensions: B sequences, n queries, H query heads, G key/value heads, C entries, L layers


class Allocator:
    """Entries that each layer may keep per head."""

    @property
    def needs_stats(self) -> bool:
        """Whether budgets follow from what all layers have seen of a prompt (`observe`)."""
        return False

    @property
    def needs_prompt(self) -> bool:
        """Whether budgets follow from a prompt that has been read whole."""
        return self.needs_stats

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        """The budgets of all layers.

        Args:
            num_layers: L.
            prompt_len: tokens of the first call.
            stats: what `observe` gave for each layer; None where nothing was observed, or not yet.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement layer_budgets")

    def observe(self, entries: Entries, obs: Observation) -> Tensor:
        """What a layer tells about itself: numbers of one sequence, from its prompt.

        Args:
            entries: of one sequence (B = 1), nothing evicted.
            obs: with the queries of the prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} observes nothing")


@dataclass(frozen=True)
class UniformBudget(Allocator):
    """The same for every layer.

    Attributes:
        budget: entries per head; None where `compression_ratio` says it.
        compression_ratio: share of the prompt that is removed.

    Raises:
        ValueError: both or none of the two, or a ratio outside [0, 1).
    """

    budget: int | None = None
    compression_ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.compression_ratio is None):
            raise ValueError(
                "give either budget (entries) or compression_ratio (share removed), got "
                f"{self.budget} and {self.compression_ratio}."
            )
        if self.compression_ratio is not None and not 0 <= self.compression_ratio < 1:
            raise ValueError(
                f"compression_ratio must lie in [0, 1), got {self.compression_ratio}. It is what is removed."
            )

    @property
    def needs_prompt(self) -> bool:
        return self.budget is None

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        if self.budget is not None:
            return [self.budget] * num_layers
        assert self.compression_ratio is not None
        return [max(1, int(prompt_len * (1 - self.compression_ratio)))] * num_layers


@dataclass(frozen=True)
class PyramidBudget(Allocator):
    """Lower layers keep more, in even steps (PyramidKV, Cai et al., 2406.02069).

    Attributes:
        budget: entries per head and layer on average.
        beta: the last layer keeps budget / beta.
        window: last tokens that every layer keeps; below it all layers get the average.
    """

    budget: int
    beta: int = 20
    window: int = 64

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        if num_layers == 1:
            return [self.budget]  # a layer by itself has no place in a pyramid
        return pyramid(float(self.budget), num_layers, prompt_len, self.beta, self.window)


def pyramid(average: float, num_layers: int, prompt_len: int, beta: int, window: int) -> list[int]:
    """Budgets of all layers whose mean is `average`, falling from the first to the last."""
    least = average / beta
    most = 2 * average - least
    if most >= prompt_len - window:
        most = prompt_len - window
        least = 2 * average - most
    if not prompt_len >= most >= least >= window:
        return [max(1, round(average))] * num_layers
    step = (most - least) / max(1, num_layers - 1)
    return [round(most - index * step) for index in range(num_layers)]


@dataclass(frozen=True)
class VarianceBudget(Allocator):
    """Layers whose attention is spread evenly keep more (D2O, Wan et al., 2406.13035).

    Attributes:
        share: entries per layer on average, as a share of the prompt (the paper's heavy hitters and recent
            tokens together).
    """

    share: float

    @property
    def needs_stats(self) -> bool:
        return True

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        if stats is None:
            return [max(1, int(prompt_len * self.share))] * num_layers
        spread = torch.stack([self._evenness(item) for item in stats])
        weights = (-spread).softmax(0)
        ratios = (weights * len(stats) * self.share).clamp(0.01, 1)
        return [max(1, int(prompt_len * float(ratio))) for ratio in ratios]

    def observe(self, entries: Entries, obs: Observation) -> Tensor:
        """(H,) variance over tokens of the attention that each received."""
        mass = obs.sums(entries, obs.num_new)  # (1, H, C)
        return mass.var(dim=-1)[0]

    @staticmethod
    def _evenness(variance: Tensor) -> Tensor:
        """One number of a layer: its variances, scaled to [0, 1] over heads, on average."""
        least, most = variance.min(), variance.max()
        return ((variance - least) / (most - least + 1e-6)).mean()


@dataclass(frozen=True)
class ErrorAwareBudget(Allocator):
    """Layers that err more under compression keep more (CompressKV, 2508.02401).

    Attributes:
        errors: error of each layer, measured beforehand, in any unit.
        budget: entries per layer on average.
        least: of a layer.
        most: of a layer; None for three times the budget.
    """

    errors: tuple[float, ...]
    budget: int
    least: int = 32
    most: int | None = None

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        if num_layers != len(self.errors):
            raise ValueError(
                f"the calibration has {len(self.errors)} layers, the model {num_layers}. Calibrate it."
            )
        most = 3 * self.budget if self.most is None else self.most
        return error_aware(self.errors, self.budget * num_layers, self.least, most)


def error_aware(importance: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Budgets within [least, most] that follow the importance of layers and sum to `total` where they can."""
    spare, whole = total - least * len(importance), sum(importance)
    shares = [item / whole if whole else 1 / len(importance) for item in importance]
    if spare <= 0:
        return [least] * len(importance)
    budgets = [min(most, max(least, least + round(share * spare))) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: -shares[i])
    while sum(budgets) != total:
        step = 1 if sum(budgets) < total else -1
        moved = False
        for index in order if step > 0 else order[::-1]:
            if sum(budgets) == total:
                break
            if least <= budgets[index] + step <= most:
                budgets[index] += step
                moved = True
        if not moved:
            break
    return budgets


@dataclass(frozen=True)
class GroupedArithmeticBudget(Allocator):
    """Groups of layers share a budget that falls from group to group (WindowKV, 2503.17922).

    Attributes:
        budget: entries per layer on average, the suffix not counted.
        group: layers of a group.
        beta: the last group keeps budget * group / beta.
    """

    budget: int
    group: int = 8
    beta: int = 14

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        num_groups = num_layers // self.group
        if num_groups <= 1:
            return [self.budget] * num_layers
        last = self.budget * self.group // self.beta
        first = 2 * self.budget - last
        step = (first - last) // (num_groups - 1)
        groups = [first - index * step for index in range(num_groups - 1)] + [last]
        return [groups[min(index // self.group, num_groups - 1)] for index in range(num_layers)]


@dataclass(frozen=True)
class PreferenceBudget(Allocator):
    """Entries in full precision: more for layers of even, varied, peaked attention (ARKV, 2603.08727).

    Attributes:
        cache_size: entries of a layer, those of lower precision included.
        window: last tokens in full precision.
        taus: temperatures of entropy, variance and kurtosis.
    """

    cache_size: int
    window: int
    taus: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def needs_stats(self) -> bool:
        return True

    def layer_budgets(
        self, num_layers: int, prompt_len: int, stats: Sequence[Tensor] | None = None
    ) -> list[int]:
        if stats is None:
            return [self.cache_size] * num_layers
        preferences = [self.preference(item) for item in stats]
        most, room = max(preferences), self.cache_size - self.window
        limit = max(0, min(room, prompt_len - self.window))
        ratios = [item / most if most > 0 else 1.0 for item in preferences]
        return [self.window + min(limit, max(0, round(ratio * room))) for ratio in ratios]

    def preference(self, stats: Tensor) -> float:
        """P of a layer from its entropy, variance and kurtosis (3,)."""
        return math.prod(
            max(0.0, float(x)) ** (1 / tau) for x, tau in zip(stats.double(), self.taus, strict=True)
        )

    def observe(self, entries: Entries, obs: Observation) -> Tensor:
        """(3,) entropy, variance and kurtosis of the attention, causal zeros included."""
        length = obs.num_new
        entropy = torch.zeros((), dtype=torch.float64, device=entries.key.device)
        powers: list[Tensor] = []

        def add(weights: Tensor) -> None:
            nonlocal entropy
            wide = weights.double()  # (1, G, R, n, C)
            entropy -= (wide * (wide + 1e-10).log()).sum()
            sums = torch.stack([wide.pow(p).sum(3) for p in (1, 2, 3, 4)])
            powers[:] = [powers[0] + sums] if powers else [sums]

        obs.weigh(entries, length, add)
        m1, m2, m3, m4 = powers[0] / length  # raw moments (1, G, R, C)
        central2 = m2 - m1**2
        central4 = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        variance = (central2 * length / max(1, length - 1)).sum()
        kurtosis = (central4 / central2.clamp(min=1e-8) ** 2).sum()
        return torch.stack([entropy, variance, kurtosis])
