"""How much an entry is worth: small functions from entries and an observation to (B, G, C).

A higher score stays longer. Scorers need not care for empty slots, sinks, recent tokens and ties: the policy
does (empty slots lose, forced ones win, of equal ones the earlier stays).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import check_choice
from .entries import Entries
from .reading import Observation, wide_dtype

# Dimensions: B sequences, H query heads, G key/value heads, R = H/G, C entries, D key width, W window, n
# queries


class Scorer:
    """Scores the entries of one layer.

    Inherit it: the defaults are those of a scorer that looks at the entries alone.

    Attributes:
        window: last queries that the cache keeps for this scorer (`obs.queries`).
        looks_at: last queries of the current call that it looks at, where it keeps none.
        accumulates: `observe` adds to `entries.score` with every token read.
        has_extra: every token brings a number along (`entries.extra`): `extra` in a transformers model, the
            gate of the layer in a mixer.
    """

    @property
    def window(self) -> int:
        return 0

    @property
    def looks_at(self) -> int:
        return 0

    @property
    def accumulates(self) -> bool:
        return False

    @property
    def has_extra(self) -> bool:
        return False

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        """(B, G, C), higher stays longer."""
        raise NotImplementedError(f"{type(self).__name__} does not implement score")

    def observe(self, weights: Tensor, obs: Observation) -> Tensor:
        """What the attention weights (B, G, R, n, C) of new queries add to `entries.score`: (B, G, C)."""
        raise NotImplementedError(f"{type(self).__name__} accumulates nothing")

    def extra(self, attention: nn.Module, hidden_states: Tensor) -> Tensor:
        """The number of each new token, (B, T, G), from what an attention layer of transformers is given."""
        raise NotImplementedError(f"{type(self).__name__} gives tokens no number")


@dataclass(frozen=True)
class Recency(Scorer):
    """The newest stay (StreamingLLM, Xiao et al., 2309.17453, with sinks forced by the policy)."""

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        return entries.order.to(wide_dtype(entries.key.dtype))


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Keys of small norm stay: -||k|| (Devoto et al., 2406.11430)."""

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        key = entries.key.detach()
        return -key.to(wide_dtype(key.dtype)).norm(dim=-1)


@dataclass(frozen=True)
class LastQuery(Scorer):
    """The attention of the last query, mean over all heads: every head keeps the same tokens.

    TOVA (Oren et al., 2401.06104). The newest token is forced.
    """

    @property
    def looks_at(self) -> int:
        return 1

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        weights = obs.attention(entries, 1).mean(dim=(1, 2))  # (B, C)
        scores = weights[:, None].expand(entries.order.shape)
        return scores.masked_fill(entries.order == obs.num_seen, torch.inf)


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keys unlike the mean direction stay: -cos(k_i, mean_j k_j / ||k_j||) (Park et al., 2504.15364)."""

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        key = entries.key.detach().to(wide_dtype(entries.key.dtype))
        direction = F.normalize(key, dim=-1)  # empty slots hold zeros
        valid = entries.valid[..., None]
        mean = (direction * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(key, mean.expand_as(key), dim=-1)


@dataclass(frozen=True)
class AttentionMass(Scorer):
    """All attention that an entry has received so far (H2O, Zhang et al., 2306.14048).

    Attributes:
        normalize: divide by the number of queries that could see it (the "observed attention" of kvpress).
    """

    normalize: bool = False

    @property
    def accumulates(self) -> bool:
        return True

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        assert entries.score is not None
        if not self.normalize:
            return entries.score
        return entries.score / (obs.num_seen - entries.pos).clamp(min=1)

    def observe(self, weights: Tensor, obs: Observation) -> Tensor:
        mass = weights.sum(3)  # (B, G, R, C)
        return mass.mean(2) if obs.group_reduce == "mean" else mass.amax(2)


@dataclass(frozen=True)
class PromptMass(Scorer):
    """Attention received from the queries of the last call, mean over all heads (Elastic Cache)."""

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        mass = obs.sums(entries, obs.num_new).mean(1, keepdim=True)  # (B, 1, C)
        return mass.expand(entries.order.shape)


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Attention of the last queries, smoothed along the text (SnapKV, Li et al., 2404.14469).

    The softmax runs over all entries; then those of the window are left out, the rest is averaged over the
    queries, pooled (padding with zeros that count) and reduced over the query heads.

    Attributes:
        window_size: last queries; their own entries always stay.
        kernel: odd width of the pooling.
        pool: "avg" or "max".
        heads: query heads that are looked at, for every layer: the semantic retrieval heads of CompressKV
            (2508.02401), whose mean every key/value head then takes. None for all, each for its own group.
    """

    window_size: int = 64
    kernel: int = 5
    pool: str = "avg"
    heads: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, ("avg", "max"))
        if self.window_size < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"window must be at least 1 and kernel odd, got {self.window_size} and {self.kernel}."
            )

    @property
    def window(self) -> int:
        return self.window_size

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        weights = obs.attention(entries, self.window_size).mean(2)  # (B, H, C)
        in_window = (entries.order > obs.num_seen - self.window_size)[:, :1]
        if self.heads is not None:
            if obs.layer >= len(self.heads) or max(self.heads[obs.layer]) >= weights.shape[1]:
                raise ValueError(
                    f"the heads {self.heads} do not fit layer {obs.layer} with {weights.shape[1]} heads. "
                    "Calibrate this model."
                )
            weights = weights[:, list(self.heads[obs.layer])]
            weights = pooled(weights.masked_fill(in_window, 0), self.kernel, self.pool).mean(1, keepdim=True)
            scores = weights.expand(entries.order.shape)
        else:
            by_head = in_window.expand(-1, weights.shape[1], -1)
            scores = obs.reduce_group(
                pooled(weights.masked_fill(by_head, 0), self.kernel, self.pool), entries.order.shape[1]
            )
        return scores.masked_fill(entries.order > obs.num_seen - self.window_size, torch.inf)


@dataclass(frozen=True)
class WindowedAttention(Scorer):
    """The score of a whole window of entries, from the queries of the suffix (WindowKV, 2503.17922).

    Attributes:
        window_tokens: entries of a window.
        suffix: last tokens, whose queries are looked at.
        strategy: "max", the mean of the better half of a full window's entries (of all, where it is shorter)
            per head and then over heads; "average", their plain mean.
    """

    window_tokens: int = 8
    suffix: int = 32
    strategy: str = "max"

    @property
    def window(self) -> int:
        return self.suffix

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        mass = obs.attention(entries, self.suffix).sum(2)  # (B, H, C)
        review = mass.shape[-1] - self.suffix
        if review < 1:
            return torch.zeros_like(entries.order, dtype=mass.dtype)
        parts = []
        for part in mass[..., :review].split(self.window_tokens, dim=-1):
            best = part
            if self.strategy == "max" and part.shape[-1] == self.window_tokens:
                best = part.topk(max(1, self.window_tokens // 2), dim=-1).values
            parts.append(best.mean(-1).mean(-1)[:, None].expand(-1, part.shape[-1]))
        scores = torch.cat([*parts, mass.new_full((mass.shape[0], self.suffix), torch.inf)], dim=-1)
        return scores[:, None].expand(entries.order.shape)


@dataclass(frozen=True)
class HeavyHitter(Scorer):
    """Mean and spread of the attention that an entry received from the queries of the last call.

    mean_t A + gamma var_t A over all query rows (causal zeros included, unbiased; of a single query the mean
    alone), without the last `window_size` columns, pooled over 5, mean over the group (ARKV, 2603.08727).

    Attributes:
        window_size: last entries, which always stay.
        gamma: weight of the variance.
        kernel: odd width of the pooling.
    """

    window_size: int = 32
    gamma: float = 0.5
    kernel: int = 5

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        count = obs.num_new
        total = obs.sums(entries, count)  # (B, H, C)
        scores = total / count
        if count > 1 and self.gamma:
            squares = obs.sums(entries, count, power=2)
            scores = scores + self.gamma * (squares - total**2 / count) / (count - 1)
        in_window = entries.order > obs.num_seen - self.window_size
        scores = scores.masked_fill(in_window[:, :1], 0)
        scores = obs.reduce_group(pooled(scores, self.kernel, "avg"), entries.order.shape[1])
        return scores.masked_fill(in_window, torch.inf)


def pooled(x: Tensor, kernel: int, pool: str) -> Tensor:
    """Pools x (B, H, C) >= 0 along C with stride 1; zeros beyond the ends take part."""
    if pool == "avg":
        return F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)
    return F.max_pool1d(x, kernel, stride=1, padding=kernel // 2)
