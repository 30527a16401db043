"""Methods that drop entries, each as a policy: a scorer, a budget, and what is forced."""

from __future__ import annotations

from . import scorers
from .budgets import PyramidBudget
from .merging import ValueMerger
from .policy import EvictionPolicy, Prefill
from .selection import HeadAdaptive


def streaming_llm(
    budget: int, *, n_sink: int = 4, rerotate: bool = False, interval: int = 1, prefill: Prefill = "grid"
) -> EvictionPolicy:
    """The first `n_sink` tokens and the last `budget - n_sink` (Xiao et al., 2309.17453).

    Args:
        budget: entries per head.
        n_sink: attention sinks.
        rerotate: positions are ranks in the cache, as in the paper; else those in the text.
        interval: tokens between two compressions.
        prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.Recency(),
        budget=budget,
        sinks=n_sink,
        rerotate=rerotate,
        interval=interval,
        prefill=prefill,
        name="streaming_llm",
    )


def h2o(
    budget: int,
    *,
    recent_ratio: float = 0.5,
    normalize: bool = False,
    merge: bool = False,
    interval: int = 1,
    prefill: Prefill = "grid",
) -> EvictionPolicy:
    """What has received most attention, and the recent tokens (Zhang et al., 2306.14048).

    Args:
        budget: entries per head.
        recent_ratio: share of it for the last tokens.
        normalize: divide the attention by the number of queries that could give any ("observed attention").
        merge: values of evicted entries join similar survivors (CaM).
        interval, prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.AttentionMass(normalize=normalize),
        budget=budget,
        recent=recent_ratio,
        merger=ValueMerger() if merge else None,
        interval=interval,
        prefill=prefill,
        name="h2o",
    )


def snapkv(
    budget: int,
    *,
    window: int = 64,
    kernel: int = 5,
    pool: str = "avg",
    adaptive: bool = False,
    safeguard: float = 0.2,
    merge: bool = False,
    interval: int = 1,
    prefill: Prefill = "grid",
) -> EvictionPolicy:
    """What the last queries attend to, smoothed along the text (Li et al., 2404.14469).

    Args:
        budget: entries per head, the window included.
        window: last queries; their own entries always stay.
        kernel, pool: of the smoothing: odd width, "avg" or "max".
        adaptive: heads share the budget of the layer by their scores (AdaKV).
        safeguard: share of the budget that every head keeps then.
        merge: values of evicted entries join similar survivors (CaM).
        interval, prefill: see `EvictionPolicy`.
    """
    if window >= budget:
        raise ValueError(
            f"a budget of {budget} entries must be larger than the observation window of {window} queries. "
            "Raise the budget or shorten the window."
        )
    return EvictionPolicy(
        scorer=scorers.WindowAttention(window, kernel, pool),
        budget=budget,
        recent=window,
        selector=HeadAdaptive(safeguard) if adaptive else None,
        merger=ValueMerger() if merge else None,
        interval=interval,
        prefill=prefill,
        name="snapkv",
    )


def pyramidkv(
    budget: int,
    *,
    window: int = 64,
    beta: int = 20,
    kernel: int = 5,
    interval: int = 1,
    prefill: Prefill = "one_shot",
) -> EvictionPolicy:
    """SnapKV with more entries in lower layers (Cai et al., 2406.02069).

    Args:
        budget: entries per head and layer on average; in a single mixer, its own.
        window, kernel: as in `snapkv`.
        beta: the last layer keeps budget / beta.
        interval, prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.WindowAttention(window, kernel),
        budget=PyramidBudget(budget, beta, window),
        recent=window,
        interval=interval,
        prefill=prefill,
        name="pyramidkv",
    )


def tova(budget: int, *, sinks: int = 0, interval: int = 1, prefill: Prefill = "grid") -> EvictionPolicy:
    """The tokens that the last query attends to, the same in every head (Oren et al., 2401.06104).

    Args:
        budget: entries per head.
        sinks: first tokens that always stay.
        interval, prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.LastQuery(),
        budget=budget,
        sinks=sinks,
        recent=1,
        interval=interval,
        prefill=prefill,
        name="tova",
    )


def key_norm(
    budget: int,
    *,
    sinks: int = 0,
    recent: int | float = 0,
    interval: int = 1,
    prefill: Prefill = "grid",
) -> EvictionPolicy:
    """Keys of small norm (Devoto et al., 2406.11430); needs no attention weights.

    Args:
        budget: entries per head.
        sinks, recent: first and last tokens that always stay.
        interval, prefill: see `EvictionPolicy`.
    """
    return EvictionPolicy(
        scorer=scorers.KeyNorm(),
        budget=budget,
        sinks=sinks,
        recent=recent,
        interval=interval,
        prefill=prefill,
        name="key_norm",
    )


def keydiff(
    budget: int,
    *,
    sinks: int = 0,
    recent: int | float = 0,
    interval: int = 1,
    prefill: Prefill = "grid",
) -> EvictionPolicy:
    """Keys unlike the mean direction of their head (Park et al., 2504.15364).

    Args: as in `key_norm`.
    """
    return EvictionPolicy(
        scorer=scorers.KeyDiff(),
        budget=budget,
        sinks=sinks,
        recent=recent,
        interval=interval,
        prefill=prefill,
        name="keydiff",
    )
