"""What becomes of entries that leave: merged into entries that stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import check_choice
from .entries import Entries, by_position

# Dimensions: B sequences, G key/value heads, C entries, K kept entries, X evicted entries, D key width


class Merger:
    """Merges evicted entries into kept ones, or (where it `chooses`) says itself what becomes one entry."""

    @property
    def has_threshold(self) -> bool:
        """Whether a similarity is carried from compression to compression."""
        return False

    @property
    def chooses(self) -> bool:
        """Whether `choose` takes the place of selection and `merge`."""
        return False

    @property
    def compares(self) -> bool:
        """Whether every evicted key is compared with every kept one."""
        return False

    def merge(
        self, kept: Entries, evicted: Entries, threshold: Tensor | None
    ) -> tuple[Entries, Tensor | None]:
        """The kept entries with what they took over.

        Args:
            kept, evicted: entries, sorted by position; empty slots take and give nothing.
            threshold: (B, 1), where `has_threshold`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement merge")

    def choose(self, entries: Entries, scores: Tensor, budget: int) -> Entries:
        """The entries after merging, `budget` at most.

        Args:
            entries: sorted by position, empty slots last.
            scores: (B, G, C), +inf where an entry must stay by itself, -inf in empty slots.
            budget: entries of a head.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement choose")


@dataclass(frozen=True)
class ValueMerger(Merger):
    """The value of an evicted entry joins that of the survivor with the most similar key (CaM).

    v_t <- (v_t + sum w v_e) / (1 + sum w),   w = max(cos(k_e, k_t), 0) |v_e| / (|v_e| + |v_t| + 1e-6)

    Keys stay as they are. Source: Zhang et al., 2024, in the form of kvpress.
    """

    @property
    def compares(self) -> bool:
        return True

    def merge(
        self, kept: Entries, evicted: Entries, threshold: Tensor | None
    ) -> tuple[Entries, Tensor | None]:
        similarity, target = nearest_key(kept, evicted)
        norm, own = evicted.value.norm(dim=-1), kept.value.norm(dim=-1).gather(-1, target)
        weight = similarity.clamp(min=0) * norm / (norm + own + 1e-6)  # (B, G, X)
        weight = weight.masked_fill(~evicted.valid, 0)
        added = spread(kept.value, target, weight[..., None] * evicted.value)
        total = spread(weight.new_zeros(kept.order.shape), target, weight)
        value = added / (1 + total)[..., None]
        return replace(kept, value=value, **take_over(kept, evicted, target, weight > 0)), threshold


@dataclass(frozen=True)
class SimilarityMerger(Merger):
    """Evicted entries join the survivor with the most similar key where they are similar enough (D2O).

    u_i = max_j cos(k_i, k_j), j* its argmax; merged iff u_i >= tau, else dropped.
    tau: mean(u) over heads and evicted entries at the first time, then alpha tau + beta mean(u).
    paper: k_j <- w_j k_j + sum w_i k_i,  w_i = exp(u_i) / (sum exp(u) + e),  w_j = e / (sum exp(u) + e)
    code:  k_j <- mean of k_j and the u_i k_i; the same for values.

    Source: Wan et al., 2406.13035.

    Attributes:
        alpha, beta: of the threshold.
        form: "paper" (a convex sum) or "code" (which shrinks norms).
        shared_filter: compare the mean of u over heads, as the code does, in place of each head's own.
    """

    alpha: float = 0.5
    beta: float = 0.5
    form: str = "paper"
    shared_filter: bool = False

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("paper", "code"))

    @property
    def has_threshold(self) -> bool:
        return True

    @property
    def compares(self) -> bool:
        return True

    def merge(
        self, kept: Entries, evicted: Entries, threshold: Tensor | None
    ) -> tuple[Entries, Tensor | None]:
        assert threshold is not None
        similarity, target = nearest_key(kept, evicted)  # (B, G, X)
        known = evicted.valid.to(similarity.dtype)
        mean = (similarity * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)  # (B,)
        mean = mean.detach()[:, None].to(threshold.dtype)
        threshold = torch.where(threshold < -1, mean, self.alpha * threshold + self.beta * mean)
        rated = similarity.mean(1, keepdim=True).expand_as(similarity) if self.shared_filter else similarity
        merged = (rated >= threshold[:, :, None]) & evicted.valid
        if self.form == "paper":
            weight = torch.where(merged, similarity, 0).exp() * merged
            own = torch.full_like(kept.key[..., 0], torch.e)
            total = spread(own, target, weight)
        else:
            weight = similarity * merged
            own = torch.ones_like(kept.key[..., 0])
            total = spread(own, target, merged.to(own.dtype))
        pair = [
            spread(own[..., None] * x, target, weight[..., None] * y) / total[..., None]
            for x, y in ((kept.key, evicted.key), (kept.value, evicted.value))
        ]
        changed = take_over(kept, evicted, target, merged)
        if self.form == "code":
            changed["score"] = kept.score  # which the code leaves alone
        return replace(kept, key=pair[0], value=pair[1], **changed), threshold


@dataclass(frozen=True)
class NearestPositionMerger(Merger):
    """Every evicted entry is averaged into the survivor nearest in the text (Elastic Cache, 2407.18121)."""

    def merge(
        self, kept: Entries, evicted: Entries, threshold: Tensor | None
    ) -> tuple[Entries, Tensor | None]:
        distance = (evicted.order[..., :, None] - kept.order[..., None, :]).abs()  # (B, G, X, K)
        far = torch.iinfo(distance.dtype).max
        target = distance.masked_fill(~kept.valid[:, :, None], far).argmin(-1)
        given = evicted.valid.to(kept.key.dtype)
        total = spread(torch.ones_like(kept.key[..., 0]), target, given)[..., None]
        key = spread(kept.key, target, given[..., None] * evicted.key) / total
        value = spread(kept.value, target, given[..., None] * evicted.value) / total
        changed = take_over(kept, evicted, target, evicted.valid)
        return replace(kept, key=key, value=value, **changed), threshold


@dataclass(frozen=True)
class RunMerger(Merger):
    """Runs of similar neighbours become one entry each (KVMerger, Wang et al., 2407.08454).

    Neighbours with cos(k_t, k_{t-1}) > eps are of one run; eps falls as far as the budget needs it. The pivot
    p of a run is its entry with the largest score, and

        k_M = sum w_i k_i,  v_M = sum w_i v_i,  w_i = g_i / sum g,  g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)),
        sigma = mean_{i != p} |k_p - k_i| / sqrt(2)

    Entries that must stay are runs of their own. Where even eps = -1 leaves too many, runs of low score go.

    Attributes:
        eps: similarity from which on neighbours are merged whatever the budget.
    """

    eps: float = 0.75

    @property
    def chooses(self) -> bool:
        return True

    def choose(self, entries: Entries, scores: Tensor, budget: int) -> Entries:
        key, valid = entries.key, entries.valid
        cosine = F.cosine_similarity(key[..., 1:, :], key[..., :-1, :], dim=-1).detach()  # (B, G, C - 1)
        free = (scores < torch.inf) & valid
        cosine = cosine.masked_fill(~(free[..., 1:] & free[..., :-1]), -torch.inf)
        num_over = (valid.sum(-1) - budget).clamp(min=0)  # joins that the budget needs
        ranked = cosine.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(ranked).scatter_(
            -1, ranked, torch.arange(ranked.shape[-1], device=key.device).expand_as(ranked)
        )
        joined = ((cosine > self.eps) | (rank < num_over[..., None])) & (cosine > -torch.inf)
        run = F.pad((~joined).cumsum(-1), (1, 0))  # (B, G, C)
        weight, pivot = self._weights(key, scores.masked_fill(~valid, -torch.inf), run)
        sums = [_by_run(x * weight[..., None], run) for x in (key, entries.value)]
        changed: dict[str, Any] = {
            "key": sums[0].gather(2, run[..., None].expand_as(key)),
            "value": sums[1].gather(2, run[..., None].expand_as(entries.value)),
        }
        for name in ("score", "count"):
            x = getattr(entries, name)
            if x is not None:
                changed[name] = _by_run(x, run).gather(-1, run)
        merged = replace(entries, **changed)
        keep = pivot & valid
        rating = torch.where(scores == torch.inf, scores, changed["score"]) if "score" in changed else scores
        best = rating.masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        stays = torch.zeros_like(keep).scatter(-1, best[..., :budget], True) & keep
        index = by_position(torch.where(stays, entries.order, 0))[..., :budget]
        return merged.take(index, stays.gather(-1, index))

    def _weights(self, key: Tensor, scores: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, C) the share of each entry in its run, and True at the pivots."""
        num = run.shape[-1]
        lowest = scores.new_full(run.shape, -torch.inf)
        top = lowest.scatter_reduce(-1, run, scores, "amax")  # (B, G, runs)
        slot = torch.arange(num, device=run.device).expand_as(run)
        best = torch.where(scores == top.gather(-1, run), slot, num)
        first = torch.full_like(run, num - 1).scatter_reduce(-1, run, best, "amin").gather(-1, run)
        centre = key.gather(2, first[..., None].expand_as(key))
        distance = (key - centre).square().sum(-1)  # squared
        # the root has no gradient at zero
        length = torch.where(distance > 0, distance, 1).sqrt() * (distance > 0)
        size = _by_run(torch.ones_like(length), run)
        sigma = (_by_run(length, run) / (size - 1).clamp(min=1) / 2**0.5).clamp(min=1e-6).gather(-1, run)
        near = (-distance / (2 * sigma**2)).exp()
        return near / _by_run(near, run).gather(-1, run), slot == first


def _by_run(x: Tensor, run: Tensor) -> Tensor:
    """Sums of x (B, G, C, ...) over runs: run number i in slot i."""
    return spread(torch.zeros_like(x), run, x)


def nearest_key(kept: Entries, evicted: Entries) -> tuple[Tensor, Tensor]:
    """Cosine to, and slot of, the kept key that is most similar to each evicted one: (B, G, X) each."""
    left = F.normalize(evicted.key, dim=-1)
    right = F.normalize(kept.key, dim=-1)
    cosine = left @ right.transpose(2, 3)  # (B, G, X, K)
    cosine = cosine.masked_fill(~kept.valid[:, :, None], -2.0)
    found = cosine.max(dim=-1)
    return found.values, found.indices


def take_over(kept: Entries, evicted: Entries, target: Tensor, merged: Tensor) -> dict[str, Any]:
    """Scores and counts of kept entries with those of the entries that were merged into them.

    Args:
        target: (B, G, X) slot of each evicted entry.
        merged: (B, G, X) bool, which are merged; the others are dropped.
    """
    found: dict[str, Any] = {}
    for name in ("score", "count"):
        own, gone = getattr(kept, name), getattr(evicted, name)
        found[name] = None if own is None else spread(own, target, gone.masked_fill(~merged, 0))
    return found


def spread(onto: Tensor, target: Tensor, parts: Tensor) -> Tensor:
    """Adds parts (B, G, X, ...) to the slots `target` (B, G, X) of a tensor (B, G, K, ...)."""
    index = target if parts.dim() == 3 else target[..., None].expand_as(parts)
    return onto.scatter_add(2, index, parts.to(onto.dtype))
