"""What a bounded cache weighs, before it is filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .policy import EvictionPolicy
from .presets import make_policy
from .reading import wide_dtype
from .tiers import FewerChannels, LowBits, ThreeStates

# Dimensions: L layers, H query heads, G key/value heads, D head width, T tokens


def kv_bytes(
    config: Any,
    num_tokens: int,
    policy: EvictionPolicy | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of the cache of one sequence after a prompt, counters included.

    Exact where the budget alone says how many entries stay, head by head or together. Where the choice does
    (runs, whole windows, a threshold) it is the most that a cache can hold; where budgets follow from the
    prompt, that of their average.

    Args:
        config: of a transformers model: `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
            `head_dim` or `hidden_size`.
        num_tokens: of the prompt, read in one call.
        policy: of the cache, or its plain data; None for a cache that keeps everything.
        dtype: of keys and values.
    """
    num_layers, heads = config.num_hidden_layers, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    full = num_layers * num_tokens * groups * 2 * width * dtype.itemsize
    if policy is None:
        return full
    policy = make_policy(policy)
    budgets = policy.allocator.layer_budgets(num_layers, num_tokens)
    skipped = policy.skipped(num_layers)
    total = len(skipped) * full // num_layers
    for index, budget in enumerate(budgets):
        if index not in skipped:
            slots = policy.mean_width(budget)
            total += _layer_bytes(policy, budget, slots, num_tokens, heads, groups, width, dtype)
    return total


def _layer_bytes(
    policy: EvictionPolicy,
    budget: int,
    slots: int,
    num_tokens: int,
    heads: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
) -> int:
    wide = wide_dtype(dtype).itemsize
    scorer, tier = policy.scorer, policy.tier
    stored = wide if policy.merger is not None else dtype.itemsize
    entry = 2 * width * stored + 4  # the position
    entry += wide * (scorer.accumulates + scorer.has_extra)
    entry += 4 * ((policy.merger is not None) + (policy.lookup is not None))
    beside = 16 + scorer.window * heads * width * dtype.itemsize
    if policy.is_ragged:
        beside += 4 * groups
    if policy.merger is not None and policy.merger.has_threshold:
        beside += wide
    if policy.lookup is not None:
        beside += wide * groups * (width + 1)
    if isinstance(tier, LowBits):
        whole = min(num_tokens, budget + tier.recent)
        low, group = num_tokens - whole, tier.group or width
        if low:
            beside += 8 + 4 * groups * width * tier.balance
        return beside + groups * (
            whole * entry + low * (2 * (width * tier.bits // 8 + width // group * 4) + 4)
        )
    if isinstance(tier, FewerChannels):
        whole, kept = min(num_tokens, tier.recent), width - int(width * tier.ratio)
        old = num_tokens - whole
        beside += 8 + groups * kept * 2
        return beside + groups * (whole * entry + old * ((kept + width) * dtype.itemsize + 4))
    if isinstance(tier, ThreeStates):
        return beside + groups * min(num_tokens, tier.cache_size) * entry
    if policy.prefill == "grid":
        grid = num_tokens // policy.interval * policy.interval
        return beside + groups * (min(slots, grid) + num_tokens - grid) * entry
    return beside + groups * min(slots, num_tokens) * entry
