"""Methods that merge what leaves, keep it in less space, or choose with the help of a calibration."""

from __future__ import annotations

from collections.abc import Sequence

from ..contract import check_choice
from . import scorers
from .budgets import (
    Allocator,
    ErrorAwareBudget,
    GroupedArithmeticBudget,
    PreferenceBudget,
    UniformBudget,
    VarianceBudget,
)
from .lookup import Sentences
from .merging import NearestPositionMerger, RunMerger, SimilarityMerger
from .policy import EvictionPolicy, Prefill
from .selection import WholeWindows
from .tiers import FewerChannels, LowBits, ThreeStates

UNCOMPRESSED = (0, 1, -1)  # layers of flat attention, which D2O and KVMerger leave alone


def think(*, ratio: float = 0.4, window: int = 32, recent: int = 32, interval: int = 1) -> EvictionPolicy:
    """Keys lose channels, no token is dropped (Xu et al., 2407.21018).

    Args:
        ratio: share of key channels removed.
        window: last queries of the prompt that decide which.
        recent: last tokens whose keys stay whole.
        interval: tokens between two moves out of the recent ones.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}. It is the share of channels removed.")
    return EvictionPolicy(
        scorer=scorers.Recency(),
        budget=recent,
        tier=FewerChannels(ratio, window, recent),
        interval=interval,
        prefill="one_shot",
        name="think",
    )


def d2o(
    budget: int | None = None,
    *,
    hh_ratio: float = 0.1,
    recent_ratio: float = 0.1,
    n_sink: int = 4,
    alpha: float = 0.5,
    beta: float = 0.5,
    form: str = "paper",
    shared_filter: bool = False,
    skip_layers: Sequence[int] = UNCOMPRESSED,
    interval: int = 1,
    prefill: Prefill | None = None,
) -> EvictionPolicy:
    """Heavy hitters and recent tokens; what leaves joins similar survivors (Wan et al., 2406.13035).

    Args:
        budget: entries per head; None gives each layer a share of the prompt by its attention.
        hh_ratio, recent_ratio: shares of the prompt, and the proportion of the two within a budget.
        n_sink: first tokens, which count among the heavy hitters.
        alpha, beta, form, shared_filter: of the merging, see `SimilarityMerger`.
        skip_layers: layers of a model that keep everything.
        interval, prefill: see `EvictionPolicy`; by default "grid" with a budget, else "one_shot".
    """
    allocator: int | Allocator = VarianceBudget(hh_ratio + recent_ratio) if budget is None else budget
    return EvictionPolicy(
        scorer=scorers.AttentionMass(),
        budget=allocator,
        sinks=n_sink,
        recent=recent_ratio / (hh_ratio + recent_ratio),
        merger=SimilarityMerger(alpha, beta, form, shared_filter),
        skip_layers=tuple(skip_layers),
        interval=interval,
        prefill=prefill or ("one_shot" if budget is None else "grid"),
        name="d2o",
    )


def kvmerger(
    budget: int,
    *,
    eps: float = 0.75,
    sinks: int = 4,
    recent: int | float = 0.25,
    mass_correction: bool = True,
    skip_layers: Sequence[int] = UNCOMPRESSED,
    interval: int = 1,
    prefill: Prefill = "grid",
) -> EvictionPolicy:
    """Runs of similar neighbours become one entry (Wang et al., 2407.08454).

    Args:
        budget: entries per head.
        eps: similarity from which on neighbours are merged whatever the budget; falls as far as it needs.
        sinks, recent: first and last tokens that are not merged.
        mass_correction: merged entries count as the tokens they stand for.
        skip_layers: layers of a model that keep everything.
        interval, prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.AttentionMass(),
        budget=budget,
        sinks=sinks,
        recent=recent,
        merger=RunMerger(eps),
        mass_correction=mass_correction,
        skip_layers=tuple(skip_layers),
        interval=interval,
        prefill=prefill,
        name="kvmerger",
    )


def elastic_cache(
    budget: int | None = None,
    *,
    compression_ratio: float | None = None,
    n_sink: int = 1,
    recent: int = 1,
    distance: int = 25,
) -> EvictionPolicy:
    """Entries of little importance are averaged into their neighbours (Liu et al., 2407.18121).

    Args:
        budget, compression_ratio: one of the two.
        n_sink, recent: first and last tokens that always stay.
        distance: later tokens push out the entry this far from the end of the compressed prompt.
    """
    return EvictionPolicy(
        scorer=scorers.PromptMass(),
        budget=UniformBudget(budget, compression_ratio),
        sinks=n_sink,
        recent=recent,
        merger=NearestPositionMerger(),
        fixed_slot=distance,
        prefill="one_shot",
        name="elastic_cache",
    )


def mikv(
    *,
    importance: float = 0.2,
    lo_bits: int = 2,
    group: int | None = None,
    recent: int = 32,
    balance: bool = True,
    interval: int = 1,
) -> EvictionPolicy:
    """Nothing is dropped: unimportant entries keep few bits (Yang et al., 2402.18096).

    Args:
        importance: share of the prompt kept whole; later so many entries stay whole.
        lo_bits: of the others: 2, 3, 4 or 8.
        group: channels that share scale and zero (default: a head).
        recent: last tokens kept whole besides.
        balance: balance the channels of keys before they are quantised.
        interval: tokens between two moves.
    """
    if not 0 < importance < 1:
        raise ValueError(f"importance must lie in (0, 1), got {importance}. It is the share kept whole.")
    return EvictionPolicy(
        scorer=scorers.AttentionMass(),
        budget=UniformBudget(compression_ratio=1 - importance),
        tier=LowBits(lo_bits, group, recent, balance),
        interval=interval,
        prefill="one_shot",
        name="mikv",
    )


def arkv(
    cache_size: int,
    *,
    window: int = 32,
    taus: Sequence[float] = (1.0, 1.0, 1.0),
    gamma: float = 0.5,
    interval: int = 1,
) -> EvictionPolicy:
    """Entries whole, in eight bits, or gone; layers differ in how many stay whole (2603.08727).

    Args:
        cache_size: entries per head, both kinds.
        window: last entries, always whole.
        taus: temperatures of the layers' entropy, variance and kurtosis.
        gamma: weight of the variance in an entry's score.
        interval: tokens between two compressions.
    """
    if window >= cache_size:
        raise ValueError(
            f"cache_size {cache_size} must be larger than the window of {window} tokens. Raise it or shorten "
            "the window."
        )
    first, second, third = (float(tau) for tau in taus)
    return EvictionPolicy(
        scorer=scorers.HeavyHitter(window, gamma),
        budget=PreferenceBudget(cache_size, window, (first, second, third)),
        tier=ThreeStates(cache_size, window),
        interval=interval,
        prefill="one_shot",
        name="arkv",
    )


def compresskv(
    budget: int,
    heads: Sequence[Sequence[int]],
    *,
    errors: Sequence[float] | None = None,
    window: int = 8,
    kernel: int = 5,
    interval: int = 1,
) -> EvictionPolicy:
    """SnapKV seen by the retrieval heads of each layer, one choice for all heads (2508.02401).

    Args:
        budget: entries per head and layer on average, the window included.
        heads: query heads of every layer that are looked at, from a calibration.
        errors: error of every layer under compression, from a calibration; None gives all the same budget.
        window, kernel: as in `snapkv`.
        interval: tokens between two compressions.
    """
    allocator: int | Allocator = budget if errors is None else ErrorAwareBudget(tuple(errors), budget)
    return EvictionPolicy(
        scorer=scorers.WindowAttention(window, kernel, heads=tuple(tuple(row) for row in heads)),
        budget=allocator,
        recent=window,
        interval=interval,
        prefill="one_shot",
        name="compresskv",
    )


def windowkv(
    budget: int,
    *,
    task: str = "localization",
    window: int = 8,
    suffix: int | None = None,
    group: int = 8,
    beta: int = 14,
    interval: int = 1,
) -> EvictionPolicy:
    """Windows of tokens stay or go whole; groups of layers share one choice (2503.17922).

    Args:
        budget: entries per layer on average, the suffix not counted.
        task: "localization" (find one thing) or "aggregation" (gather many).
        window: tokens of a window.
        suffix: last tokens, which stay and whose queries decide; default 32 to localize, 16 to aggregate.
        group: layers that share a choice; the first one makes it.
        beta: the last group keeps budget * group / beta.
        interval: tokens between two compressions.
    """
    check_choice("task", task, ("localization", "aggregation"))
    strategy = "max" if task == "localization" else "average"
    suffix = (32 if task == "localization" else 16) if suffix is None else suffix
    return EvictionPolicy(
        scorer=scorers.WindowedAttention(window, suffix, strategy),
        budget=GroupedArithmeticBudget(budget, group, beta),
        recent=suffix,
        selector=WholeWindows(window, suffix),
        share_layers=group,
        interval=interval,
        prefill="one_shot",
        name="windowkv",
    )


def sentencekv(
    budget: int,
    boundary_ids: Sequence[int],
    *,
    start: int = 32,
    recent: int = 32,
    factor: int = 5,
    window: int = 32,
    kernel: int = 7,
) -> EvictionPolicy:
    """Single tokens read the sentences that they ask for (Zhu et al., 2504.00970); see `Sentences`.

    A prompt keeps `factor * budget` entries, chosen as in `snapkv`; what is read after it stays.

    Args:
        budget: entries per head that a token reads.
        boundary_ids: tokens that end a sentence, such as full stops.
        start, recent: first and last entries that it always reads.
        factor: how many budgets of entries a prompt keeps.
        window, kernel: as in `snapkv`; the pooling takes the largest.
    """
    return EvictionPolicy(
        scorer=scorers.WindowAttention(window, kernel, "max"),
        budget=factor * budget,
        recent=window,
        lookup=Sentences(tuple(boundary_ids), budget, start, recent),
        prefill="one_shot",
        name="sentencekv",
    )
