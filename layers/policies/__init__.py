"""Policies of a bounded key/value cache: what stays, what merges, what loses precision."""

from .budgets import (
    Allocator,
    ErrorAwareBudget,
    GroupedArithmeticBudget,
    PreferenceBudget,
    PyramidBudget,
    UniformBudget,
    VarianceBudget,
)
from .dropping import h2o, key_norm, keydiff, pyramidkv, snapkv, streaming_llm, tova
from .entries import Entries, LayerMemory, PolicyState
from .flat import FlatState
from .keeping import (
    arkv,
    compresskv,
    d2o,
    elastic_cache,
    kvmerger,
    mikv,
    sentencekv,
    think,
    windowkv,
)
from .lookup import Lookup, Sentences
from .merging import Merger, NearestPositionMerger, RunMerger, SimilarityMerger, ValueMerger
from .packed import PackedEntries, PackedState, dequantize, quantize_fp8, quantize_per_token
from .policy import EvictionPolicy, Place
from .presets import PRESETS, make_policy
from .reading import Observation, attend, rerotate_keys
from .retention import Retention, retention
from .scorers import (
    AttentionMass,
    HeavyHitter,
    KeyDiff,
    KeyNorm,
    LastQuery,
    PromptMass,
    Recency,
    Scorer,
    WindowAttention,
    WindowedAttention,
)
from .selection import GlobalBudget, HeadAdaptive, Selector, WholeWindows
from .sizes import kv_bytes
from .tiers import FewerChannels, LowBits, ThreeStates, Tier

__all__ = [
    "PRESETS",
    "Allocator",
    "AttentionMass",
    "Entries",
    "ErrorAwareBudget",
    "EvictionPolicy",
    "FewerChannels",
    "FlatState",
    "GlobalBudget",
    "GroupedArithmeticBudget",
    "HeadAdaptive",
    "HeavyHitter",
    "KeyDiff",
    "KeyNorm",
    "LastQuery",
    "LayerMemory",
    "Lookup",
    "LowBits",
    "Merger",
    "NearestPositionMerger",
    "Observation",
    "PackedEntries",
    "PackedState",
    "Place",
    "PolicyState",
    "PreferenceBudget",
    "PromptMass",
    "PyramidBudget",
    "Recency",
    "Retention",
    "RunMerger",
    "Scorer",
    "Selector",
    "Sentences",
    "SimilarityMerger",
    "ThreeStates",
    "Tier",
    "UniformBudget",
    "ValueMerger",
    "VarianceBudget",
    "WholeWindows",
    "WindowAttention",
    "WindowedAttention",
    "arkv",
    "attend",
    "compresskv",
    "d2o",
    "dequantize",
    "elastic_cache",
    "h2o",
    "key_norm",
    "keydiff",
    "kv_bytes",
    "kvmerger",
    "make_policy",
    "mikv",
    "pyramidkv",
    "quantize_fp8",
    "quantize_per_token",
    "rerotate_keys",
    "retention",
    "sentencekv",
    "snapkv",
    "streaming_llm",
    "think",
    "tova",
    "windowkv",
]
