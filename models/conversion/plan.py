"""What to convert: the new mixer, the blocks that get it, and which blocks keep their attention."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...layers.bmojo import BMojoConfig
from ...layers.contract import MixerConfig, suggest
from ...layers.registry import mixer_entry
from ..config import ModelConfig
from .weight_maps import sizes_like

# "even_odd" converts the even blocks (Wang et al., arXiv 2408.15237); the last two need measured scores.
SELECTION_METHODS = ("uniform", "even_odd", "mse", "loss")
MEASURED_METHODS = ("mse", "loss")
GQA_METHODS = ("keep", "expand")


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Which blocks keep their attention.

    Attributes:
        method: "uniform" keeps every so-manieth block; "even_odd" keeps the odd ones; "mse" and "loss" keep
            those that are hardest to replace, measured after the alignment of all (see
            `memzoo.train.conversion.layer_scores`).
        keep: number of blocks to keep, or their share as a number below 1. Without meaning for "even_odd".
    """

    method: str = "uniform"
    keep: int | float = 0.25

    def __post_init__(self) -> None:
        if self.method not in SELECTION_METHODS:
            raise ValueError(
                f"the selection method {self.method!r} is unknown. "
                f"{suggest(str(self.method), SELECTION_METHODS)}"
            )
        is_number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
        if not is_number or self.keep < 0 or (isinstance(self.keep, float) and not self.keep < 1):
            raise ValueError(
                f"keep must be a number of blocks (0, 1, 2, ...) or a share below 1, got {self.keep!r}."
            )

    def num_kept(self, depth: int) -> int:
        """Number of blocks that keep their attention in a model of `depth` blocks.

        Raises:
            ValueError: more blocks than there are.
        """
        if self.method == "even_odd":
            return depth // 2
        kept = round(self.keep * depth) if isinstance(self.keep, float) else self.keep
        if kept > depth:
            raise ValueError(f"keep={self.keep} of {depth} blocks is impossible. Give at most {depth}.")
        return kept


def select_layers(
    selection: LayerSelection, depth: int, scores: Mapping[int, float] | None = None
) -> list[int]:
    """Blocks that keep their attention, ascending.

    Args:
        selection: how they are chosen.
        depth: number of blocks.
        scores: block -> how much is lost when it is converted, for the measured methods; ties keep the lower
            number.

    Raises:
        ValueError: a measured method without a score for every block.
    """
    kept = selection.num_kept(depth)
    if selection.method == "even_odd":
        return list(range(1, depth, 2))
    if selection.method == "uniform":
        return [index * depth // kept for index in range(kept)]
    if scores is None or set(scores) != set(range(depth)):
        raise ValueError(
            f"the selection method {selection.method!r} needs a score for each of {depth} blocks, got "
            f"{'none' if scores is None else sorted(scores)}. Measure them with layer_scores."
        )
    return sorted(sorted(scores, key=lambda index: (-scores[index], index))[:kept])


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """One conversion, as data.

    Attributes:
        target: the new mixer, `{type: ..., ...}`; heads, rotary positions and biases are taken over from the
            attention it replaces unless given, inside composites too.
        layers: blocks to convert, or how to choose those that are not; None converts all.
        gqa: "keep" leaves keys and values their heads; "expand" gives every query head its own, repeated
            from the source, so that they can diverge in training.
    """

    target: Mapping[str, Any]
    layers: Sequence[int] | LayerSelection | None = None
    gqa: str = "keep"

    def __post_init__(self) -> None:
        if not isinstance(self.target, Mapping):
            raise ValueError(
                f"the target of a conversion must be a mapping with a type, got {self.target!r}. "
                "Write {type: ..., ...}."
            )
        if "type" not in self.target:
            raise ValueError(f"the target of a conversion needs a type, got the keys {sorted(self.target)}.")
        if self.gqa not in GQA_METHODS:
            raise ValueError(f"gqa must be one of {', '.join(GQA_METHODS)}, got {self.gqa!r}.")

    @property
    def is_measured(self) -> bool:
        """Whether the blocks to convert are known only after a measurement."""
        return isinstance(self.layers, LayerSelection) and self.layers.method in MEASURED_METHODS

    def converted_layers(self, depth: int) -> list[int]:
        """Blocks to convert in a model of `depth` blocks, ascending; all of them before a measurement.

        Raises:
            ValueError: block numbers outside the model or given twice.
        """
        if isinstance(self.layers, LayerSelection):
            kept = [] if self.is_measured else select_layers(self.layers, depth)
            self.layers.num_kept(depth)  # an impossible number is found before the measurement
            return [index for index in range(depth) if index not in kept]
        if self.layers is None:
            return list(range(depth))
        valid = isinstance(self.layers, Sequence) and all(
            isinstance(index, int) and not isinstance(index, bool) and 0 <= index < depth
            for index in self.layers
        )
        if not valid or len(set(self.layers)) != len(self.layers):
            raise ValueError(
                f"layers to convert must be distinct numbers from 0 to {depth - 1}, got {self.layers!r}. "
                "Leave layers out to convert all."
            )
        return sorted(self.layers)


def converted_config(source: ModelConfig, plan: ConversionPlan) -> ModelConfig:
    """The config of the model that a plan makes of a model with the config `source`.

    Raises:
        ValueError: block numbers outside the model, or a target that is no valid mixer.
    """
    entries = {}
    for index in plan.converted_layers(source.depth):
        old = source.mixers[index].to_dict()
        if plan.gqa == "expand" and "num_heads" in old:
            old["num_kv_heads"] = old["num_heads"]
        entries[index] = complete_entry(plan.target, old)
    return source.replace_mixers(entries)


def complete_entry(entry: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """A mixer entry with what it has in common with the mixer it replaces, inner mixers likewise."""
    known = {item.name for item in dataclasses.fields(mixer_entry(str(entry.get("type"))).config)}
    inherited = {
        name: value
        for name, value in old.items()
        if name in known and name not in ("type", "d_model", "mixers")
    }
    merged = {**inherited, **sizes_like(str(entry.get("type")), old), **copy.deepcopy(dict(entry))}
    if isinstance(merged.get("mixers"), (list, tuple)):
        merged["mixers"] = [
            complete_entry(inner, old) if isinstance(inner, Mapping) else inner for inner in merged["mixers"]
        ]
    return merged


def exact_reach(mixer: MixerConfig) -> int | None:
    """Tokens up to which a freshly converted mixer equals the attention it came from.

    Returns:
        0 where nothing is promised, None where the sequence may be of any length.
    """
    if mixer.type == "attention":
        return None
    if mixer.type == "gated_attention":
        return 1  # a token has no age for itself; what the gates say of others begins small, not at 0
    if mixer.type == "parallel":  # coefficients per channel begin at 0
        inner: tuple[MixerConfig, ...] = getattr(mixer, "mixers", ())
        return exact_reach(inner[0]) if getattr(mixer, "combine", "") == "channel" else 0
    if isinstance(mixer, BMojoConfig):
        return mixer.window_size + _doubled_reach(mixer)
    if mixer.type in ("sliding_window", "lolcats", "allmem"):
        return int(getattr(mixer, "window_size", 0))
    return 0


def softmax_reach(mixer: MixerConfig) -> int | None:
    """Tokens up to which a trained mixer is softmax attention over all that was read.

    Returns:
        0 where it never is, None where the sequence may be of any length.
    """
    if isinstance(mixer, BMojoConfig):
        return mixer.window_size
    return exact_reach(mixer) if mixer.type in ("attention", "sliding_window", "lolcats") else 0


def _doubled_reach(mixer: BMojoConfig) -> int:
    """Fading tokens that are the tokens themselves at first."""
    is_plain = (mixer.zero_gate or not mixer.mixers) and not mixer.fading_norm and mixer.num_fading is None
    # a stored token counts twice while its image, the token itself, is in sight
    return mixer.fading_reach if is_plain and mixer.window_size and not mixer.has_store else 0


def window_of(target: Mapping[str, Any]) -> dict[str, int] | None:
    """`window_size` and `num_sinks` of a target, defaults of its type included; of the first inner mixer
    that has them in a composite. None where there is no window.
    """
    entry = mixer_entry(str(target.get("type")))
    values = {item.name: item.default for item in dataclasses.fields(entry.config)} | {
        **entry.preset,
        **target,
    }
    size, sinks = values.get("window_size"), values.get("num_sinks", 0)
    if isinstance(size, int):
        return {"window_size": size, "num_sinks": sinks if isinstance(sinks, int) else 0}
    inner = target.get("mixers")
    for item in inner if isinstance(inner, (list, tuple)) else ():
        if isinstance(item, Mapping) and (found := window_of(item)):
            return found
    return None
