"""A prompt is read once with full attention; every policy that compresses at its end begins from there.

What a policy does at the end of a prompt changes no output of the prompt, so queries, keys and values are
those of the model with its full cache, and so are those of a shorter prompt that begins alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memzoo.layers.policies import EvictionPolicy
from memzoo.models.policy_cache import PolicyCache, PolicyCacheLayer

# Dimensions: N rows, T tokens, H query heads, G key/value heads, D head width, M model width, V vocabulary

RECORDER = "benchmark_recorder"


@dataclass(frozen=True)
class LayerReading:
    """What an attention layer was given: q (N, T, H, D), k and v (N, T, G, D), hidden (N, T, M)."""

    attention: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    scale: float


@dataclass(frozen=True)
class Reading:
    """A prompt that was read.

    Attributes:
        ids: (N, T).
        layers: one per attention layer.
        logits: (N, 1, V) after the last token.
    """

    ids: Tensor
    layers: list[LayerReading]
    logits: Tensor


@torch.no_grad()
def read(model: LlamaForCausalLM, ids: Tensor) -> Reading:
    """Reads prompts (N, T) with full attention."""
    layers: list[LayerReading] = []
    hidden: dict[nn.Module, Tensor] = {}
    original = model.config._attn_implementation
    base = ALL_ATTENTION_FUNCTIONS[original]

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden[module] = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]

    def recorder(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        parts = (x.transpose(1, 2) for x in (q, k, v))
        layers.append(LayerReading(module, *parts, hidden.pop(module), options["scaling"]))
        return base(module, q, k, v, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register(RECORDER, recorder)
    hooks = [
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers
    ]
    model.set_attn_implementation(RECORDER)
    try:
        logits = model(ids, logits_to_keep=1, use_cache=False).logits
    finally:
        model.set_attn_implementation(original)
        for hook in hooks:
            hook.remove()
    return Reading(ids, layers, logits)


@torch.no_grad()
def full_cache(model: LlamaForCausalLM, reading: Reading, cut: int) -> DynamicCache:
    """The cache that keeps everything, after the first `cut` tokens."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(reading.layers):
        cache.update(*(x[:, :cut].transpose(1, 2) for x in (layer.k, layer.v)), index)
    return cache


@torch.no_grad()
def policy_cache(model: LlamaForCausalLM, policy: EvictionPolicy, reading: Reading, cut: int) -> PolicyCache:
    """The cache under a policy after the first `cut` tokens were read in one call."""
    assert policy.prefill == "one_shot"
    cache = PolicyCache(model.config, policy)
    ends = None if policy.lookup is None else policy.lookup.ends(reading.ids[:, :cut])
    for index, (layer, seen) in enumerate(zip(cache.layers, reading.layers, strict=True)):
        q, k, v = (x[:, :cut] for x in (seen.q, seen.k, seen.v))
        if not isinstance(layer, PolicyCacheLayer):
            layer.update(k.transpose(1, 2), v.transpose(1, 2))
            continue
        layer.lazy_initialization(k, v)
        if policy.scorer.has_extra:
            layer.extra = policy.scorer.extra(seen.attention, seen.hidden[:, :cut])
        layer.ends = ends
        layer.read(q, k, v, None, seen.scale, lambda keys, values, out=q: out)  # its output is known
        layer.extra, layer.ends = None, None
        cache.finish(index)
    return cache
