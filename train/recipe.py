"""Recipes of conversion: what to convert to, on which text, for how many steps; read from YAML and checked
against a model before any work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from .. import configs
from ..layers.contract import suggest
from ..layers.registry import mixer_entry
from ..models.config import ModelConfig
from ..models.conversion import converted_config, memory_off
from ..models.decoder import MemoryLM
from .data.documents import check_text_file
from .data.texts import load_text
from .distillation import lora_size


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """A staged conversion, as data.

    Attributes:
        target: the new mixer, `{type: ..., ...}`; heads and positions come from the attention it replaces.
        layers: blocks to convert; None converts all.
        texts: bundled training texts, by name; state_of_the_union where no files are given either.
        files: local training texts.
        seq_len: tokens of one window of text.
        batch_size: windows per step.
        align_steps: steps of stage 1, which trains only parameters that the source does not have.
        align_lr: peak learning rate of stage 1.
        tune_steps: steps of stage 2, which trains low-rank updates and the new parameters.
        tune_lr: peak learning rate of stage 2.
        new_lr_scale: rate of the new parameters in stage 2 as a multiple of tune_lr; 0 freezes them.
        lora_rank: rank of the updates of the hybrid; the control gets the rank that matches its budget.
        lora_targets: projections that are updated.
        kl_weight: weight of the divergence from the teacher in stage 2.
        ce_weight: weight of the cross-entropy of the next token in stage 2.
        seed: of initialisation and data order.
    """

    target: Mapping[str, Any] = field(
        default_factory=lambda: {
            "type": "lolcats",
            "window_size": 64,
            "num_sinks": 4,
            "feature_dim": 64,
            "is_affine": True,
            "initial_window_share": 0.99,
        }
    )
    layers: Sequence[int] | None = None
    texts: Sequence[str] = ()
    files: Sequence[str] = ()
    seq_len: int = 1024
    batch_size: int = 1
    align_steps: int = 40
    align_lr: float = 1e-2
    tune_steps: int = 110
    tune_lr: float = 1e-3
    new_lr_scale: float = 10.0
    lora_rank: int = 16
    lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.target, Mapping):
            raise ValueError(
                f"the target of a conversion must be a mapping with a type, got {self.target!r}. "
                "Write {type: ..., ...}."
            )
        if "type" not in self.target:
            raise ValueError(f"the target of a conversion needs a type, got the keys {sorted(self.target)}.")
        for name in ("seq_len", "batch_size", "align_steps", "tune_steps", "lora_rank", "seed"):
            value, least = getattr(self, name), int(name in ("seq_len", "batch_size"))
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("align_lr", "tune_lr", "new_lr_scale", "kl_weight", "ce_weight"):
            value, is_rate = getattr(self, name), name.endswith("_lr")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                range_of = "a positive number" if is_rate else "a number of at least 0"
                # YAML reads 1e-3, without a point, as text
                raise ValueError(f"{name} must be {range_of}, got {value!r}. Write it as 0.001 or 1.0e-3.")
        if not self.kl_weight + self.ce_weight:
            raise ValueError("kl_weight and ce_weight must not both be 0. Leave them out for 1 and 0.")
        for name in ("texts", "files", "lora_targets"):
            value = getattr(self, name)
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            if not is_list or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must be a list of names, got {value!r}. Write {name}: [NAME, ...].")
        if isinstance(self.layers, Sequence) and not self.layers:
            raise ValueError("layers must name a block, got []. Leave layers out to convert all.")
        if not self.texts and not self.files:
            object.__setattr__(self, "texts", ("state_of_the_union",))


def recipe_dict(recipe: ConversionRecipe) -> dict[str, Any]:
    """The recipe as plain data for a record."""
    return asdict(recipe) | {"target": dict(recipe.target)}


def read_recipe(name: str, **changes: Any) -> ConversionRecipe:
    """A shipped recipe by name, or one from a YAML file; `changes` that are not None replace fields.

    Raises:
        ValueError: no such recipe, an unknown key (the nearest is suggested), or a value out of range.
    """
    path = (
        Path(name) if Path(name).suffix in (".yaml", ".yml") else configs.find(f"convert/{name}", "convert")
    )
    if not path.is_file():
        raise ValueError(
            f"there is no recipe file {name!r} (looked in {Path.cwd()}). Check the path. "
            f"{configs.suggestion(name, 'convert')}"
        )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a mapping of recipe fields, got {type(values).__name__}.")
    known = {item.name for item in fields(ConversionRecipe)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in recipe {name}. {suggest(str(key), known)}")
    return ConversionRecipe(
        **{**values, **{key: value for key, value in changes.items() if value is not None}}
    )


def check_recipe(recipe: ConversionRecipe, source: ModelConfig) -> None:
    """Refuses a recipe that does not fit a model, before any work: all its models are built without weights.

    Args:
        source: the config of the model to convert.

    Raises:
        ValueError: layers outside the model, a target that is no valid mixer or lacks a window or a memory
            that can be switched off or has other heads than the model, projections that no layer has,
            training windows that never leave the window of the mixer, or a training text that is not there.
    """
    memoryless = window_only(recipe.target)
    window = MemoryLM(converted_config(source, memoryless, recipe.layers), device="meta")
    for index in range(source.depth) if recipe.layers is None else recipe.layers:
        replaced = source.mixers[index].to_dict()
        for name in ("d_model", "num_heads", "num_kv_heads", "head_dim"):
            if name in recipe.target and recipe.target[name] != replaced.get(name):
                raise ValueError(
                    f"the target has {name}={recipe.target[name]!r}, the attention of layer {index} has "
                    f"{replaced.get(name)!r}. Leave {name} out to inherit it."
                )
    hybrid = MemoryLM(converted_config(source, recipe.target, recipe.layers), device="meta")
    with memory_off(hybrid):
        pass
    linear = {
        name.rpartition(".")[2] for name, module in hybrid.named_modules() if isinstance(module, nn.Linear)
    }
    for name in recipe.lora_targets:
        if name not in linear:
            raise ValueError(
                f"lora_targets: the converted model has no linear layer {name!r}. {suggest(name, linear)}"
            )
    if not lora_size(window, recipe.lora_targets):
        raise ValueError(
            f"lora_targets {list(recipe.lora_targets)} name no linear layer of the control, which could then "
            "not be tuned. Add a projection of its attention, such as q_proj."
        )
    reach = memoryless["window_size"] + memoryless["num_sinks"]
    if recipe.seq_len <= reach:
        raise ValueError(
            f"seq_len must be above window_size + num_sinks = {reach}, got {recipe.seq_len}: no token would "
            "ever reach the memory."
        )
    for name in recipe.texts:
        load_text(name)
    for file in recipe.files:
        check_text_file(file)


def window_only(target: Mapping[str, Any], num_sinks: int | None = None) -> dict[str, Any]:
    """The memoryless mixer with the window and the sinks of a target, defaults of its type included.

    Raises:
        ValueError: an unknown type, or one without a window.
    """
    entry = mixer_entry(str(target.get("type")))
    values = {item.name: item.default for item in fields(entry.config)} | {**entry.preset, **target}
    if not isinstance(values.get("window_size"), int):
        raise ValueError(
            f"the target {dict(target)} has no window_size, which the rows without memory and the control "
            "are made from. Add window_size, or choose a mixer that has one, such as lolcats."
        )
    sinks = values.get("num_sinks", 0) if num_sinks is None else num_sinks
    return {"type": "sliding_window", "window_size": values["window_size"], "num_sinks": sinks}
