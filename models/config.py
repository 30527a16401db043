"""The configuration of a whole model: plain data, checked when it is made.

A model is a stack of blocks (norm, mixer, norm, MLP) between an embedding and a head. Which mixer stands in
which block is data:

    layers: {type: sliding_window, window_size: 512}                            # the same in every block
    layers: {pattern: [{type: based, ...}, {type: attention}], repeat: 6}       # 12 blocks
    layers: [{type: attention}, {pattern: [...], repeat: 4}]                    # spelled out, groups allowed

Fields that many mixers share (heads, rotary base, ...) are written once, in `mixer_defaults`: each mixer
takes those that its own config has and that its entry does not set.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..layers.contract import MixerConfig, check_choice, check_positive, check_size, number_hint, suggest
from ..layers.registry import list_mixers, mixer_config, mixer_entry

MLP_TYPES = ("swiglu", "gelu", "none")
NORM_TYPES = ("rms", "layer")
MAX_LAYERS = 4096  # more is a slip of the pen, found before memory runs out

LayerPlan = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What `MemoryLM` is built from.

    Attributes:
        vocab_size: rows of the embedding.
        d_model: width of the residual stream.
        layers: mixers of the blocks, in one of the three forms above.
        num_layers: number of blocks; may be left out where `layers` says it.
        mixer_defaults: fields for every mixer that has them and does not set them itself, inner mixers
            included.
        mlp: `{type: swiglu | gelu | none, d_ff: int}`, one for all blocks or a list with one entry per block.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm).
        norm_eps: its epsilon.
        tie_embeddings: whether the head is the embedding.
        max_position_embeddings: context length of pretraining; informative, nothing is cut at it.
        initializer_range: standard deviation of embedding, head and MLP at initialisation.
        residual_in_fp32: keep the residual stream in float32 when the weights are bfloat16.

    Raises:
        ValueError: a value out of range, an unknown mixer or key (the nearest is suggested), sizes that do
            not fit, or an entry of `mixer_defaults` that no mixer of the model has.
    """

    vocab_size: int
    d_model: int
    layers: LayerPlan
    num_layers: int | None = None
    mixer_defaults: Mapping[str, Any] = field(default_factory=dict)
    mlp: LayerPlan = field(default_factory=lambda: {"type": "none"})
    norm: str = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "d_model")
        for name in ("num_layers", "max_position_embeddings"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_choice("norm", self.norm, NORM_TYPES)
        for name in ("tie_embeddings", "residual_in_fp32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(
                    f"{name} must be a number between 0 and 1, got {value!r}.{number_hint(value)}"
                )
        entries = _expand(self.layers, self.num_layers)
        object.__setattr__(self, "num_layers", len(entries))
        self._check_defaults(entries)
        # building them once checks every entry; the properties below are cached
        assert len(self.mixers) == len(self.mlps)

    @cached_property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The config of the mixer of each block, defaults filled in."""
        configs = []
        for index, entry in enumerate(_expand(self.layers, self.num_layers)):
            try:
                configs.append(mixer_config(self._with_defaults(entry)))
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
        return tuple(configs)

    @cached_property
    def mlps(self) -> tuple[Mapping[str, Any], ...]:
        """The MLP entry of each block: `type`, and `d_ff` unless the type is "none"."""
        entries = [self.mlp] * self.depth if isinstance(self.mlp, Mapping) else list(self.mlp)
        if len(entries) != self.depth:
            raise ValueError(
                f"mlp lists {len(entries)} entries for {self.depth} layers. Give one entry, or one per layer."
            )
        for entry in entries:
            _check_mlp(entry)
        return tuple(entries)

    @property
    def depth(self) -> int:
        """Number of blocks (`num_layers`, known to be set)."""
        assert self.num_layers is not None
        return self.num_layers

    def replace_mixers(self, mixers: Mapping[int, Mapping[str, Any]]) -> ModelConfig:
        """A copy with other mixers in some blocks; defaults that no mixer uses any more are dropped.

        Args:
            mixers: block number -> mixer entry (`{type: ..., ...}`, completed by `mixer_defaults`).

        Raises:
            ValueError: a block number out of range, or an entry that is no valid mixer.
        """
        entries = [dict(entry) for entry in _expand(self.layers, self.num_layers)]
        for index, entry in mixers.items():
            if not 0 <= index < len(entries):
                raise ValueError(f"layer {index} does not exist. Give numbers from 0 to {len(entries) - 1}.")
            entries[index] = copy.deepcopy(dict(entry))
        used = {name for entry in entries for name in _fields_inside(entry)}
        defaults = {name: value for name, value in self.mixer_defaults.items() if name in used}
        return dataclasses.replace(self, layers=entries, mixer_defaults=defaults)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON, YAML) from which `from_dict` builds an equal config."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from plain data.

        Raises:
            ValueError: unknown key (the nearest is suggested), missing key, or a value out of range.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"unknown key {key!r} in the model config. {suggest(str(key), fields)}")
        missing = [name for name in ("vocab_size", "d_model", "layers") if name not in values]
        if missing:
            raise ValueError(f"the model config needs the keys {missing}. Add them.")
        return cls(**copy.deepcopy(dict(values)))

    def _with_defaults(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """`entry` completed by d_model and by the defaults that its type has, inner mixers likewise."""
        merged = {"d_model": self.d_model, **entry}
        if "type" not in entry:
            return merged
        known = {item.name for item in dataclasses.fields(mixer_entry(entry["type"]).config)}
        for name, value in self.mixer_defaults.items():
            if name in known and name != "mixers":
                merged.setdefault(name, value)
        if isinstance(entry.get("mixers"), (list, tuple)):
            merged["mixers"] = [
                self._with_defaults(inner) if isinstance(inner, Mapping) else inner
                for inner in entry["mixers"]
            ]
        return merged

    def _check_defaults(self, entries: Sequence[Mapping[str, Any]]) -> None:
        if not isinstance(self.mixer_defaults, Mapping):
            raise ValueError(f"mixer_defaults must map field names to values, got {self.mixer_defaults!r}.")
        reserved = {"type", "d_model", "mixers"} & set(self.mixer_defaults)
        if reserved:
            raise ValueError(
                f"mixer_defaults cannot set {sorted(reserved)}. Write them in the layers themselves."
            )
        used = {name for entry in entries for name in _fields_inside(entry)}
        for name in self.mixer_defaults:
            if name not in used:
                raise ValueError(
                    f"mixer_defaults names {name!r}, which no mixer of this model has. "
                    f"{suggest(str(name), used)}"
                )


def _expand(layers: Any, num_layers: int | None) -> list[Mapping[str, Any]]:
    """The entry of every block, in order."""
    if num_layers is not None and num_layers > MAX_LAYERS:
        raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {num_layers}.")
    if isinstance(layers, Mapping):
        if "pattern" in layers:
            entries = list(_expand_group(layers, num_layers))
        elif num_layers is None:
            raise ValueError("layers is a single mixer, so num_layers must say how many blocks there are.")
        else:
            entries = [layers] * num_layers
    elif isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        entries = []
        for item in layers:
            if isinstance(item, Mapping) and "pattern" in item:
                entries.extend(_expand_group(item, None))
            else:
                entries.append(item)
    else:
        raise ValueError(f"layers must be a mixer entry, a pattern or a list of them, got {layers!r}.")
    if not entries:
        raise ValueError("layers is empty. A model needs at least one block.")
    if num_layers is not None and len(entries) != num_layers:
        raise ValueError(
            f"layers describes {len(entries)} blocks, but num_layers is {num_layers}. Leave num_layers out."
        )
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
            raise ValueError(
                f"layer {index} is {entry!r}, expected an entry with a type, one of: "
                f"{', '.join(list_mixers())}."
            )
    return entries


def _expand_group(group: Mapping[str, Any], num_layers: int | None) -> Iterator[Mapping[str, Any]]:
    for key in group:
        if key not in ("pattern", "repeat"):
            raise ValueError(
                f"unknown key {key!r} beside pattern. {suggest(str(key), ('pattern', 'repeat'))}"
            )
    pattern = group["pattern"]
    if not isinstance(pattern, Sequence) or isinstance(pattern, (str, bytes)) or not pattern:
        raise ValueError(f"pattern must be a list of mixer entries, got {pattern!r}.")
    repeat = group.get("repeat")
    if repeat is None:
        if num_layers is None or num_layers % len(pattern):
            raise ValueError(
                f"a pattern of {len(pattern)} mixers needs repeat, or a num_layers that it divides; there is "
                f"no repeat, and num_layers is {num_layers}. Write repeat: 1 for the pattern alone."
            )
        repeat = num_layers // len(pattern)
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ValueError(f"repeat must be an integer of at least 1, got {repeat!r}.")
    if repeat * len(pattern) > MAX_LAYERS:
        raise ValueError(
            f"a pattern of {len(pattern)} mixers repeated {repeat} times makes more than {MAX_LAYERS} "
            "blocks. Use a smaller repeat."
        )
    for _ in range(repeat):
        yield from pattern


def _fields_inside(entry: Mapping[str, Any]) -> Iterator[str]:
    """Names of the config fields of a mixer entry and of the mixers inside it."""
    for item in dataclasses.fields(mixer_entry(entry["type"]).config):
        yield item.name
    inner = entry.get("mixers")
    for other in inner if isinstance(inner, (list, tuple)) else ():
        if isinstance(other, Mapping) and "type" in other:
            yield from _fields_inside(other)


def _check_mlp(entry: Any) -> None:
    if not isinstance(entry, Mapping) or "type" not in entry:
        raise ValueError(
            f"an mlp entry needs a type, got {entry!r}. Write {{type: swiglu, d_ff: ...}} or {{type: none}}."
        )
    check_choice("mlp type", entry["type"], MLP_TYPES)
    known = ("type",) if entry["type"] == "none" else ("type", "d_ff")
    for key in entry:
        if key not in known:
            raise ValueError(f"unknown key {key!r} for mlp {entry['type']!r}. {suggest(str(key), known)}")
    width = entry.get("d_ff", 0)
    if entry["type"] != "none" and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise ValueError(
            f"mlp {entry['type']!r} needs d_ff, an integer of at least 1, got {entry.get('d_ff')!r}."
        )
    check_size("d_ff", width)


def _plain(value: Any) -> Any:
    if isinstance(value, MixerConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
