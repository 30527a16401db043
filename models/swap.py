"""Putting mixers of this library into a plain transformers model, in place of its attention.

    model = AutoModelForCausalLM.from_pretrained(folder)
    memzoo.swap(model, {3: {"type": "sliding_window", "window_size": 256, "num_sinks": 4}})
    model.generate(...)          # works as before; the state of the mixer lives in the model's own cache

Works for the Llama-style families that `memzoo.models.checkpoints` reads (Llama, Mistral, Qwen2, Qwen3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..layers import MixerConfig, State, TokenMixer, build_mixer, mixer_config
from .checkpoints.families import config_from_hf
from .conversion import complete_entry, weight_map

# Dimensions: B batch rows, T tokens of the call, P tokens of the past, M model width


def swap(model: PreTrainedModel, mixers: Mapping[int, Mapping[str, Any] | MixerConfig]) -> PreTrainedModel:
    """Replaces the attention of some layers, in place; weights of equal name and shape are taken over.

    Args:
        model: a transformers model of a Llama-style family.
        mixers: layer number -> mixer entry; heads, rotary positions and biases are those of the layer unless
            given.

    Returns:
        the same model.

    Raises:
        ValueError: a layer outside the model, an entry that is no valid mixer, or a model of another family.
    """
    layers = _decoder_layers(model)
    source = config_from_hf(model.config.to_dict(), type(model).__name__)
    built: dict[int, TokenMixer] = {}
    for index, entry in mixers.items():
        if not isinstance(index, int) or not 0 <= index < len(layers):
            raise ValueError(f"layer {index!r} does not exist. Give numbers from 0 to {len(layers) - 1}.")
        if not isinstance(entry, MixerConfig):
            old = source.mixers[index].to_dict()
            entry = mixer_config({"d_model": source.d_model, **complete_entry(entry, old)})
        mixer = build_mixer(entry)
        if mixer.owns_norm or mixer.needs:
            raise ValueError(
                f"mixer {entry.type!r} needs more than hidden states and cannot stand in a "
                "plain transformers model."
            )
        if mixer.d_model != source.d_model:
            raise ValueError(
                f"the mixer for layer {index} has d_model={mixer.d_model}, the model has {source.d_model}. "
                "Leave d_model out to inherit it."
            )
        built[index] = mixer
    for index, mixer in built.items():
        attention = cast(nn.Module, layers[index].self_attn)
        weights, own = attention.state_dict(), mixer.state_dict()
        taken = {
            name: origin.fill(own[name], weights)[0]
            for name, origin in weight_map(source.mixers[index], mixer.config).items()
        }
        mixer.load_state_dict({**own, **taken})
        first = next(attention.parameters())
        layers[index].self_attn = SwappedMixer(
            mixer.to(first.device, first.dtype).train(attention.training), index
        )
    return model


class SwappedMixer(nn.Module):
    """Stands where a transformers layer expects its attention; its state lives in the cache that `generate`
    passes on.
    """

    def __init__(self, mixer: TokenMixer, layer_idx: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, M) -> ((B, T, M), None); positions are counted by the state, padding is read
        off the mask.
        """
        mask = _real_tokens(attention_mask, hidden_states.shape[1])
        if past_key_values is None:
            return self.mixer(hidden_states, mask=mask).hidden, None
        layer = _memory_layer(past_key_values, self.layer_idx)
        all_real = mask is None or bool(mask.all())
        if hidden_states.shape[1] == 1 and all_real and layer.state is not None:
            out = self.mixer.step(hidden_states[:, 0], layer.state, donate=not torch.is_grad_enabled())
            hidden = out.hidden[:, None]
        else:
            out = self.mixer(hidden_states, layer.state, mask=mask, return_state=True)
            hidden = out.hidden
        layer.advance(out.state, hidden_states.shape[1])
        return hidden, None


class MemoryCacheLayer(CacheLayerMixin):
    """One layer of a transformers cache that holds the state of a mixer instead of keys and values."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.cumulative_length = 0  # tokens of the calls, padding included, as transformers counts them

    def advance(self, state: State, num_tokens: int) -> None:
        self.state = state
        self.cumulative_length += num_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a memory layer holds no keys and values")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a memory layer holds no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """A state follows its inputs; nothing to do."""

    def reset(self) -> None:
        self.state, self.cumulative_length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a memory cannot be cut back to fewer tokens, which assisted and contrastive decoding need. "
            "Use greedy decoding, sampling or beam search."
        )


def _memory_layer(cache: Cache, index: int) -> MemoryCacheLayer:
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"swapped layers need a transformers Cache with layers, got {type(cache).__name__}. "
            "Use DynamicCache."
        )
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[index], MemoryCacheLayer):
        cache.layers[index] = MemoryCacheLayer()
    return cache.layers[index]


def _real_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B, T) which tokens of the call are real, from a 2-D padding mask or a 4-D attention mask (boolean or
    additive).

    In a 4-D mask a token is real when it may see itself: padded keys are hidden from everybody.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    own = attention_mask[:, 0, -length:, -length:].diagonal(dim1=-2, dim2=-1)  # (B, T)
    return own if own.dtype == torch.bool else own == 0


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(layers[0], "self_attn"):
        raise ValueError(
            "swap knows models whose layers stand in model.model.layers[i].self_attn, got "
            f"{type(model).__name__}. "
            "Use build_mixer and place the layer yourself."
        )
    return layers
