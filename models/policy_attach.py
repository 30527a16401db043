"""How a transformers model is brought to read `PolicyCache`s: hooks, and an attention function of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..layers.policies import EvictionPolicy, make_policy
from .policy_cache import PolicyCache, PolicyCacheLayer

# Dimensions: B batch rows, T tokens of a call, H query heads, G key/value heads, D head width, S slots

ATTENTION_NAME = "memzoo_policy"  # of our function in the tables of transformers
BASES = ("sdpa", "eager")

_READING: WeakKeyDictionary[nn.Module, tuple[PolicyCache | None, str]] = WeakKeyDictionary()


@contextmanager
def attach_policy(
    model: PreTrainedModel, policy: EvictionPolicy | Mapping[str, Any]
) -> Iterator[PreTrainedModel]:
    """Lets a model read `PolicyCache`s inside the block; afterwards it is as before.

    Args:
        model: a decoder of transformers with the attention implementation "sdpa" or "eager".
        policy: that of the caches.

    Raises:
        ValueError: another attention implementation, or (inside the block) a cache of another kind or policy.
    """
    policy = make_policy(policy)
    original = model.config._attn_implementation
    if original not in BASES:
        raise ValueError(
            f"attach_policy serves models with {' or '.join(BASES)} attention, this one has {original!r}. "
            f'Load it with attn_implementation="{BASES[0]}".'
        )
    _register()
    ids: list[Tensor] = []  # (B, T) of the call that is being read

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        ids.clear()

    def embed(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        ids.append(arguments[0])

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        layer = None
        if cache is not None:
            if not isinstance(cache, PolicyCache) or cache.policy != policy:
                given = repr(cache.policy) if isinstance(cache, PolicyCache) else type(cache).__name__
                raise ValueError(
                    f"the policy {policy!r} is attached, but the cache is {given}. Pass "
                    "past_key_values=PolicyCache(model.config, policy)."
                )
            held = cache.layers[module.layer_idx]
            layer = held if isinstance(held, PolicyCacheLayer) else None
        if layer is not None:
            layer.is_attached = True
            if policy.scorer.has_extra:
                hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
                layer.extra = policy.scorer.extra(module, hidden)
            if policy.lookup is not None:
                if not ids:
                    raise ValueError(
                        f"policy {policy.name!r} tells sentences apart by token ids, but the model was given "
                        "none. Pass input_ids instead of inputs_embeds."
                    )
                layer.ends = policy.lookup.ends(ids[-1])
        _READING[module] = (cache if layer is not None else None), original

    def after(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        cache, _ = _READING.pop(module, (None, ""))
        if cache is not None:
            layer = cache.layers[module.layer_idx]
            layer.is_attached, layer.extra, layer.ends = False, None, None

    hooks = []
    for module in _attention_modules(model):
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    if policy.lookup is not None:
        hooks.append(model.base_model.register_forward_pre_hook(begin))
        hooks.append(model.get_input_embeddings().register_forward_pre_hook(embed))
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(original)
        for hook in hooks:
            hook.remove()


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layers with layer_idx and o_proj. attach_policy serves "
            "decoders of the Llama family."
        )
    return found


def _register() -> None:
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of the model's own implementation, boolean; eager adds it up later."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in the tables of transformers: (B, H, T, D) and (B, G, T, D) -> (B, T, H, D)."""
    cache, original = _READING.get(module, (None, BASES[0]))
    length = query.shape[2]

    def base(k: Tensor, v: Tensor) -> Tensor:
        """The model's own attention over keys and values (B, G, S, D)."""
        mask = attention_mask
        if original == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
            mask = _additive(mask, query, k)
        else:
            function = ALL_ATTENTION_FUNCTIONS[original]
        return function(module, query, k, v, mask, scaling=scaling, dropout=dropout, **kwargs)[0]

    if cache is None:
        return base(key, value), None
    layer = cache.layers[module.layer_idx]
    real = None
    if attention_mask is not None:
        # a real token sees itself
        own = attention_mask[:, 0, -length:, -length:].diagonal(dim1=-2, dim2=-1)  # (B, T)
        own = own if own.dtype == torch.bool else own == 0
        real = None if bool(own.all()) else own.expand(query.shape[0], length)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def over(keys: Tensor, values: Tensor) -> Tensor:
        return base(keys.transpose(1, 2), values.transpose(1, 2))

    out = layer.read(q, k, v, real, scale, over)
    cache.finish(layer.index)
    return out, None


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What eager attention adds to its logits; without a mask, the causal one."""
    length, slots = query.shape[2], key.shape[2]
    if mask is not None and mask.dtype != torch.bool:
        return mask
    if mask is None:
        mask = torch.ones(length, slots, dtype=torch.bool, device=query.device).tril(slots - length)[
            None, None
        ]
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
