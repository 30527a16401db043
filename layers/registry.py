"""The one table that maps the `type` of a mixer config to its class; the top of the layers floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .allmem import AllMem, AllMemConfig
from .attention import Attention, AttentionConfig
from .base_conv import BaseConv, BaseConvConfig
from .based import BasedAttention, BasedConfig
from .bmojo import BMojoConfig, BMojoMixer
from .contract import MixerConfig, TokenMixer, suggest
from .fast_weight_memory import FastWeightMemory, FastWeightMemoryConfig
from .forgetting_attention import ForgettingAttention, ForgettingAttentionConfig
from .gated_attention import GatedAttention, GatedAttentionConfig
from .gated_linear_attention import GatedLinearAttention, GatedLinearAttentionConfig
from .gated_slot_attention import GatedSlotAttention, GatedSlotConfig
from .lact import LaCT, LaCTConfig
from .linear_attention import LinearAttention, LinearAttentionConfig
from .lolcats import Lolcats, LolcatsConfig
from .mamba1 import Mamba1, Mamba1Config
from .mamba2 import Mamba2, Mamba2Config
from .mamba3 import Mamba3, Mamba3Config
from .memory_as_context import MemoryAsContext, MemoryAsContextConfig
from .mlstm import MLSTM, MLSTMConfig
from .parallel import Parallel, ParallelConfig
from .persistent_tokens import PersistentTokens, PersistentTokensConfig
from .policy_attention import PolicyAttention, PolicyAttentionConfig
from .presets import PRESETS
from .sequential import Sequential, SequentialConfig
from .sliding_window import SlidingWindowAttention, SlidingWindowConfig
from .titans import Titans, TitansConfig
from .ttt import TTTMLP, TTTLinear, TTTLinearConfig, TTTMLPConfig

SmallConfigs = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class MixerEntry:
    """A registered mixer.

    Attributes:
        mixer, config: its class and its config dataclass.
        preset: defaults that take the place of those of the config.
        own_small_configs: those of a preset; None for those of the class.
    """

    mixer: type[TokenMixer]
    config: type[MixerConfig]
    preset: Mapping[str, Any] = field(default_factory=dict)
    own_small_configs: SmallConfigs | None = None

    def small_configs(self) -> SmallConfigs:
        """Two small configs of unequal sizes (fields without `type`), used by the contract tests."""
        return self.mixer.small_configs() if self.own_small_configs is None else self.own_small_configs


_MIXERS: dict[str, MixerEntry] = {}


def list_mixers() -> list[str]:
    """Names of all registered mixers, sorted."""
    return sorted(_MIXERS)


def register_mixer(
    name: str, mixer: type[TokenMixer], config: type[MixerConfig], preset: Mapping[str, Any] | None = None
) -> None:
    """Adds a mixer of your own; configs and saved models may then name it.

    Raises:
        TypeError: `mixer` is no subclass of TokenMixer, or `config` none of MixerConfig.
        ValueError: the name is taken.
    """
    for word, given, base in (("mixer", mixer, TokenMixer), ("config", config, MixerConfig)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(
                f"the {word} of {name!r} must be a subclass of {base.__name__}, got {given!r}. "
                "Call register_mixer(name, MyMixer, MyMixerConfig)."
            )
    if name in _MIXERS:
        raise ValueError(
            f"a mixer named {name!r} is registered already ({_MIXERS[name].mixer.__name__}). Choose another "
            "name."
        )
    _MIXERS[name] = MixerEntry(mixer, config, dict(preset or {}))


def register_preset(
    name: str, base: str, defaults: Mapping[str, Any], small_configs: SmallConfigs | None = None
) -> None:
    """Adds a mixer type that is another one with other defaults.

    Args:
        name: the new type.
        base: a registered type; its own preset holds where `defaults` says nothing.
        defaults: fields of its config.
        small_configs: two small configs of unequal sizes for the contract tests (default: those of `base`).

    Raises:
        ValueError: the name is taken, the base is unknown, or its config has no such field.
    """
    entry = mixer_entry(base)
    known = {item.name for item in fields(entry.config)}
    for key in defaults:
        if key not in known:
            raise ValueError(f"mixer {base!r} has no field {key!r}. {suggest(key, known)}")
    register_mixer(name, entry.mixer, entry.config, {**entry.preset, **defaults})
    _MIXERS[name] = replace(_MIXERS[name], own_small_configs=small_configs or entry.own_small_configs)


def mixer_entry(name: str) -> MixerEntry:
    """The entry of a registered name; an unknown name is an error that suggests the nearest."""
    if not isinstance(name, str) or name not in _MIXERS:
        raise ValueError(f"mixer type {name!r} is unknown. {suggest(str(name), _MIXERS)}")
    return _MIXERS[name]


def mixer_config(values: Mapping[str, Any] | MixerConfig) -> MixerConfig:
    """Builds a config, inner mixers included, from plain data such as a YAML section.

    Args:
        values: `{"type": name, field: value, ...}`; a field `mixers` holds the configs of inner mixers, which
            inherit `d_model`.

    Raises:
        ValueError: unknown type or key (the nearest is suggested), a missing key, or a value out of range.
    """
    if isinstance(values, MixerConfig):
        return values
    if not isinstance(values, Mapping):
        name = values if isinstance(values, str) else "based"
        raise ValueError(
            f"a mixer config must be a mapping with a type, got {values!r}. "
            f'Write {{"type": "{name}", "d_model": ...}}.'
        )
    if "type" not in values:
        raise ValueError(
            f"a mixer config needs a type, got the keys {sorted(values)}. Add one of: "
            f"{', '.join(list_mixers())}."
        )
    entry = mixer_entry(values["type"])
    merged: dict[str, Any] = {**entry.preset, **values}
    if isinstance(merged.get("mixers"), (list, tuple)):
        shared = {"d_model": merged["d_model"]} if "d_model" in merged else {}
        merged["mixers"] = tuple(
            inner if isinstance(inner, MixerConfig) else mixer_config({**shared, **inner})
            for inner in merged["mixers"]
        )
    return entry.config.from_dict(merged)


def build_mixer(config: Mapping[str, Any] | MixerConfig) -> TokenMixer:
    """Builds a mixer from its config; inner mixers are built first and handed to the composite one.

    Raises:
        ValueError: as `mixer_config`.
    """
    config = mixer_config(config)
    cls = mixer_entry(config.type).mixer
    inner = getattr(config, "mixers", None)
    if inner is None:
        return cls(config)
    return cls(config, [build_mixer(item) for item in inner])  # type: ignore[call-arg]  # composite mixers


register_mixer("allmem", AllMem, AllMemConfig)
register_mixer("attention", Attention, AttentionConfig)
register_mixer("base_conv", BaseConv, BaseConvConfig)
register_mixer("based", BasedAttention, BasedConfig)
register_mixer("bmojo", BMojoMixer, BMojoConfig)
register_mixer("fast_weight_memory", FastWeightMemory, FastWeightMemoryConfig)
register_mixer("forgetting_attention", ForgettingAttention, ForgettingAttentionConfig)
register_mixer("gated_attention", GatedAttention, GatedAttentionConfig)
register_mixer("gated_linear_attention", GatedLinearAttention, GatedLinearAttentionConfig)
register_mixer("gsa", GatedSlotAttention, GatedSlotConfig)
register_mixer("lact", LaCT, LaCTConfig)
register_mixer("linear_attention", LinearAttention, LinearAttentionConfig)
register_mixer("lolcats", Lolcats, LolcatsConfig)
register_mixer("mamba1", Mamba1, Mamba1Config)
register_mixer("mamba2", Mamba2, Mamba2Config)
register_mixer("mamba3", Mamba3, Mamba3Config)
register_mixer("memory_as_context", MemoryAsContext, MemoryAsContextConfig)
register_mixer("mlstm", MLSTM, MLSTMConfig)
register_mixer("parallel", Parallel, ParallelConfig)
register_mixer("persistent_tokens", PersistentTokens, PersistentTokensConfig)
register_mixer("policy_attention", PolicyAttention, PolicyAttentionConfig)
register_mixer("sequential", Sequential, SequentialConfig)
register_mixer("sliding_window", SlidingWindowAttention, SlidingWindowConfig)
register_mixer("titans", Titans, TitansConfig)
register_mixer("ttt_linear", TTTLinear, TTTLinearConfig)
register_mixer("ttt_mlp", TTTMLP, TTTMLPConfig)
for _name, _preset in PRESETS.items():
    register_preset(_name, _preset.base, _preset.defaults, _preset.small_configs)
