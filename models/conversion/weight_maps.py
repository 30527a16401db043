"""From the weights of an attention layer to those of the mixer that replaces it.

A parameter of the new mixer is filled from the parameter of the same name (projections, biases, head norms),
inside composites too. Keys and values may get more heads than the source has: its heads are then repeated,
each as a whole, so that query head h keeps the key/value head it had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layers.allmem import AllMemConfig
from ...layers.bmojo import BMojoConfig
from ...layers.contract import MixerConfig
from ...layers.mamba2 import Mamba2Config
from ...layers.registry import build_mixer

# mixers inside composites
_INSIDE = re.compile(r"^(mixers\.\d+\.)+")
_PER_KEY_HEAD = re.compile(r"(k_proj|v_proj)\.(weight|bias)")

WeightMap = Callable[[MixerConfig, MixerConfig], "Mapping[str, Source]"]
Sizes = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_WEIGHT_MAPS: dict[str, WeightMap] = {}
_SIZES: dict[str, Sizes] = {}


@dataclass(frozen=True)
class WeightSource:
    """Where a parameter comes from.

    Attributes:
        name: of the parameter in the mixer that is replaced.
        num_kv_heads: key/value heads there, for `groups` above 1.
        groups: how often each of these heads is repeated.
    """

    name: str
    num_kv_heads: int = 1
    groups: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that are read."""
        return (self.name,)

    @property
    def has_repeats(self) -> bool:
        """Whether heads are repeated."""
        return self.groups > 1

    def read(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The values, from the parameters of the mixer that is replaced."""
        weight = weights[self.name]
        return weight if self.groups == 1 else expand_gqa(weight, self.num_kv_heads, self.groups)

    def fill(self, fresh: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The parameter in place of a freshly initialised one, and how many of its rows are still fresh."""
        return self.read(weights), 0


@dataclass(frozen=True)
class StackedSource:
    """Where the rows of a fused projection come from; rows that are not listed keep their initialisation.

    Attributes:
        parts: first row -> where the rows from there on come from.
    """

    parts: Mapping[int, WeightSource]

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that are read."""
        return tuple(source.name for source in self.parts.values())

    @property
    def has_repeats(self) -> bool:
        """Whether heads are repeated in any part."""
        return any(source.has_repeats for source in self.parts.values())

    def fill(self, fresh: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The parameter in place of a freshly initialised one, and how many of its rows are still fresh.

        Raises:
            ValueError: a part that goes beyond the parameter, or has rows of another width.
        """
        filled, num_fresh = fresh.clone(), fresh.shape[0]
        for first, source in self.parts.items():
            rows = source.read(weights)
            place = filled[first : first + len(rows)]
            if place.shape != rows.shape:
                raise ValueError(
                    f"{source.name} gives rows {tuple(rows.shape)}, for which a parameter "
                    f"{tuple(fresh.shape)} has {tuple(place.shape)} from row {first} on. "
                    "Correct the weight map."
                )
            place.copy_(rows)
            num_fresh -= len(rows)
        return filled, num_fresh


@dataclass(frozen=True)
class GroupSource:
    """Where a parameter begins that the source has nothing equal to: of the query heads that share a
    key/value head, one is made. The parameter counts as new.

    Attributes:
        name: of the parameter in the mixer that is replaced.
        num_kv_heads: key/value heads there.
        axis: 0 where the heads are rows, of which the mean is taken, 1 where they are columns, which are
            added.
    """

    name: str
    num_kv_heads: int
    axis: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that are read."""
        return (self.name,)

    @property
    def has_repeats(self) -> bool:
        """Whether heads are repeated."""
        return False

    def fill(self, fresh: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The parameter in place of a freshly initialised one, all of whose rows count as fresh."""
        width = fresh.shape[self.axis] // self.num_kv_heads
        groups = weights[self.name].unflatten(self.axis, (self.num_kv_heads, -1, width))
        made = groups.mean(1) if self.axis == 0 else groups.sum(2)
        return made.flatten(self.axis, self.axis + 1), fresh.shape[0]


Source = WeightSource | StackedSource | GroupSource


def weight_map(source: MixerConfig, target: MixerConfig) -> dict[str, Source]:
    """Parameter of the new mixer -> where it comes from; parameters that are not listed are new.

    Args:
        source: config of the mixer that is replaced.
        target: config of the new mixer.
    """
    if target.type in _WEIGHT_MAPS:
        return dict(_WEIGHT_MAPS[target.type](source, target))
    with torch.device("meta"):
        old, new = build_mixer(source).state_dict(), build_mixer(target).state_dict()
    found: dict[str, Source] = {}
    for name, tensor in new.items():
        origin = _same_name(source, _INSIDE.sub("", name), old, tensor)
        if origin is not None:
            found[name] = origin
    return found


def attention_in_mamba2(source: MixerConfig, target: MixerConfig) -> dict[str, Source]:
    """Mamba-2 as linear attention without softmax: C from queries, B from keys, x from values, the output
    projection from that of the heads (Wang et al., arXiv 2408.15237, section 3). Gate, convolution, step
    sizes and rates are new.

    B and C are taken over where every head has its own, as wide as those of the attention (`num_groups` its
    query heads, `d_state` its head_dim), the rest where there are as many channels (`head_dim` the same, and
    `expand` * d_model as many as all query heads).
    """
    heads, key_heads, width = (getattr(source, name, 0) for name in ("num_heads", "num_kv_heads", "head_dim"))
    if not heads or not key_heads or not isinstance(target, Mamba2Config):
        return {}
    if (target.num_heads, target.head_dim) != (heads, width):
        return {}
    groups, channels = heads // key_heads, heads * width
    parts = {channels: WeightSource("v_proj.weight", key_heads, groups)}  # behind the gate z
    if (target.num_groups, target.d_state) == (heads, width):
        parts[2 * channels] = WeightSource("k_proj.weight", key_heads, groups)
        parts[3 * channels] = WeightSource("q_proj.weight")
    return {"in_proj.weight": StackedSource(parts), "out_proj.weight": WeightSource("o_proj.weight")}


def mamba2_like_attention(old: Mapping[str, Any]) -> dict[str, Any]:
    """Groups and state widths with which Mamba-2 takes over all projections of an attention layer."""
    heads, width, d_model = (old.get(name) or 0 for name in ("num_heads", "head_dim", "d_model"))
    if not heads or not d_model or heads * width % d_model:
        return {}
    return {"d_state": width, "num_groups": heads, "expand": heads * width // d_model}


def sizes_like(mixer_type: str, old: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields that a new mixer needs so that it can take over the weights of the one it replaces.

    Args:
        mixer_type: of the new mixer.
        old: fields of the mixer that is replaced.
    """
    return _SIZES[mixer_type](old) if mixer_type in _SIZES else {}


def register_weight_map(mixer_type: str, function: WeightMap, sizes: Sizes | None = None) -> None:
    """Uses `function(source, target)` as the map for every new mixer of a type, in place of equal names.

    Args:
        sizes: fields of the new mixer, from those of the mixer it replaces; what a plan says goes first.

    Raises:
        ValueError: the type has a map of its own already.
    """
    if mixer_type in _WEIGHT_MAPS:
        raise ValueError(f"mixer type {mixer_type!r} has a weight map already. Register it once.")
    _WEIGHT_MAPS[mixer_type] = function
    if sizes is not None:
        _SIZES[mixer_type] = sizes


def expand_gqa(weight: Tensor, num_kv_heads: int, groups: int) -> Tensor:
    """Repeats every key/value head as a whole.

    Args:
        weight: (num_kv_heads D, ...), rows of a key or value projection, or its bias.
        num_kv_heads: heads in `weight`.
        groups: query heads per key/value head.

    Returns:
        (num_kv_heads groups D, ...), the head of query head h at place h.

    Raises:
        ValueError: rows that are no multiple of the heads, or a group below 1.
    """
    if num_kv_heads < 1 or groups < 1 or weight.shape[0] % num_kv_heads:
        raise ValueError(
            f"{weight.shape[0]} rows cannot be {num_kv_heads} heads repeated {groups} times. "
            "Give the number of key/value heads of the source, and at least 1 query head for each."
        )
    heads = weight.reshape(num_kv_heads, -1, *weight.shape[1:])
    return heads.repeat_interleave(groups, dim=0).flatten(0, 1)


def _same_name(
    source: MixerConfig, name: str, old: Mapping[str, Tensor], tensor: Tensor
) -> WeightSource | None:
    """Where a parameter of a new mixer comes from that is called `name` in the old one; None for nowhere."""
    if name not in old:
        return None
    if old[name].shape == tensor.shape:
        return WeightSource(name)
    groups = _head_groups(source, name, old[name], tensor)
    return WeightSource(name, getattr(source, "num_kv_heads", 1), groups) if groups else None


def _head_groups(source: MixerConfig, name: str, old: Tensor, new: Tensor) -> int:
    """How many heads of the new projection share one of the old; 0 where it is no such projection."""
    heads = getattr(source, "num_heads", None)
    key_heads = getattr(source, "num_kv_heads", None)
    if not heads or not key_heads or not _PER_KEY_HEAD.fullmatch(name) or old.shape[1:] != new.shape[1:]:
        return 0
    groups = heads // key_heads
    return int(groups) if new.shape[0] == groups * old.shape[0] else 0


def attention_in_allmem(source: MixerConfig, target: MixerConfig) -> dict[str, Source]:
    """The window of AllMem takes over everything. The projections of its memory are its own, and begin as
    those of the attention where they have the same sizes: a head per key/value head, as wide.
    """
    assert isinstance(target, AllMemConfig)
    window, memory = target.parts()
    taken: dict[str, Source] = {
        f"mixers.0.{name}": origin for name, origin in weight_map(source, window).items()
    }
    heads = getattr(source, "num_kv_heads", None)
    if heads and (memory.num_heads, memory.head_dim) == (heads, getattr(source, "head_dim", None)):
        for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            taken[f"mixers.1.{name}.weight"] = GroupSource(f"{name}.weight", heads, axis)
    return taken


def memory_like_attention(old: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes with which the memory of AllMem begins with the projections of an attention layer."""
    heads, width = (old.get(name) or 0 for name in ("num_kv_heads", "head_dim"))
    return {"mem_dim": heads * width, "mem_heads": heads} if heads and width else {}


def attention_in_bmojo(source: MixerConfig, target: MixerConfig) -> dict[str, Source]:
    """B'MOJO takes over the projections, also for the maps that its fading stream has to itself; its inner
    mixer takes over what it would in the place of the attention.
    """
    assert isinstance(target, BMojoConfig)
    with torch.device("meta"):
        old, new = build_mixer(source).state_dict(), build_mixer(target).state_dict()
    found: dict[str, Source] = {}
    for name, tensor in new.items():
        origin = _same_name(source, name.removeprefix("fading_"), old, tensor)
        if origin is not None and not _INSIDE.match(name):
            found[name] = origin
    for index, inner in enumerate(target.mixers):
        for name, source_of in weight_map(source, inner).items():
            found[f"mixers.{index}.{name}"] = source_of
    return found


register_weight_map("allmem", attention_in_allmem, memory_like_attention)
register_weight_map("bmojo", attention_in_bmojo)
register_weight_map("mamba2", attention_in_mamba2, mamba2_like_attention)
