"""Retention gates of a model: put in, saved alone, put in again.

A file of gates holds nothing of the model they belong to, so it is small (36 MB for SmolLM2-135M in float32)
and useless beside another model: names, shapes and the sizes of the layers have to agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import read_json, verify_folder, write_folder
from ..checkpoints.safetensors_files import read_safetensors, write_safetensors_in_place
from ..decoder import MemoryLM
from .plan import ConversionPlan
from .surgery import convert_mixers

GATED = "gated_attention"
WEIGHTS_NAME = "gates.safetensors"
CONFIG_NAME = "gates.json"
KIND = "retention_gates"
GATE_PREFIX = "layers.{}.mixer.retention_gate."
_PART = ".mixer.retention_gate."
_GATE_FIELDS = ("gate", "gate_width", "gate_activation", "gate_bias", "train_length")


def attach_retention_gates(model: MemoryLM, layers: list[int] | None = None, **gate_options: Any) -> MemoryLM:
    """A copy of a model whose attention has retention gates; all its other weights keep their bits.

    Args:
        model: a model of attention layers; it is not changed.
        layers: blocks to gate; None takes all.
        gate_options: fields of `gated_attention`: gate, gate_width, gate_activation, gate_bias, train_length.

    Raises:
        ValueError: a block that is no attention, or an unknown option (the nearest is suggested).
    """
    chosen = range(model.config.depth) if layers is None else layers
    for index in chosen:
        kind = model.config.mixers[index].type
        if kind != "attention":
            raise ValueError(f"retention gates belong to layers of attention, layer {index} is {kind}.")
    plan = ConversionPlan(target={"type": GATED, **gate_options}, layers=None if layers is None else layers)
    return convert_mixers(model, plan)[0]


def gate_weights(model: MemoryLM) -> dict[str, Tensor]:
    """Name -> parameter of all retention gates of a model."""
    return {name: parameter for name, parameter in model.named_parameters() if _PART in name}


def save_gates(model: MemoryLM, folder: str | os.PathLike[str], *, base: str) -> None:
    """Saves the gates of a model and nothing else, with what they belong to.

    Args:
        model: with gates.
        folder: made if it is not there; sealed by a manifest.
        base: the name of the model they belong to, for people.

    Raises:
        ValueError: the model has no gates.
    """
    weights = {name: parameter.detach() for name, parameter in gate_weights(model).items()}
    if not weights:
        raise ValueError("the model has no retention gates. Call attach_retention_gates(model) first.")
    facts = {"base": base, "layers": _facts(model)}
    write_folder(
        folder,
        {
            WEIGHTS_NAME: lambda path: write_safetensors_in_place(path, weights),
            CONFIG_NAME: lambda path: _write_json(path, facts),
        },
        extra={"kind": KIND},
    )


def load_gates(model: MemoryLM, folder: str | os.PathLike[str], *, strict: bool = True) -> MemoryLM:
    """Puts saved gates into a model.

    Args:
        model: with gates, which are filled in place; or without, then a copy with gates is made.
        folder: of `save_gates`.
        strict: refuse gates that are missing or that the model has no place for; False takes what fits.

    Returns:
        The model, or the copy.

    Raises:
        CheckpointError: no such folder, one that is damaged, or of something else.
        ValueError: the gates are of another model.
    """
    facts, saved = read_gates(folder)
    entries = facts["layers"]
    if not gate_weights(model):
        model = _with_gates(model, entries, facts.get("base"))
    own = gate_weights(model)
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} has no place" for name in saved if name not in own]
    if strict and not problems and _without_beginnings(entries) != _without_beginnings(_facts(model)):
        problems = ["the sizes of the layers differ"]
    if strict and problems:
        raise ValueError(
            f"the gates in {folder} belong to {facts.get('base')!r} and do not fit this model: {problems[0]}"
            f"{f' ({len(problems)} such)' if len(problems) > 1 else ''}. Load them into their own model."
        )
    for name in own.keys() & saved.keys():
        if own[name].shape != saved[name].shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(saved[name].shape)}, the model wants "
                f"{tuple(own[name].shape)}. Load the gates into the model they belong to."
            )
    with torch.no_grad():
        for name in own.keys() & saved.keys():
            own[name].copy_(saved[name])
    return model


def read_gates(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What saved gates belong to, and their weights.

    Raises:
        CheckpointError: no such folder, one that is damaged, or of something else.
    """
    folder = Path(folder)
    manifest = verify_folder(folder, required=True)
    if manifest is None or manifest.get("kind") != KIND:
        raise CheckpointError(
            f"{folder} holds no retention gates. Give a folder that save_gates has written."
        )
    facts = read_json(folder / CONFIG_NAME)
    entries = facts.get("layers")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise CheckpointError(f"{folder / CONFIG_NAME} does not say which layers the gates are of.")
    return facts, read_safetensors(folder / WEIGHTS_NAME)


def _with_gates(model: MemoryLM, entries: Mapping[str, Mapping[str, Any]], base: Any) -> MemoryLM:
    """A copy with the gates that were saved, still to be filled."""
    try:
        layers = sorted(int(index) for index in entries)
        options = {name: entries[str(layers[0])][name] for name in _GATE_FIELDS}
    except (ValueError, KeyError, IndexError):
        raise CheckpointError(f"the gates of {base!r} do not say what they are.") from None
    return attach_retention_gates(model, layers, **options)


def _facts(model: MemoryLM) -> dict[str, Any]:
    """Layer -> what its gates are and what they belong to."""
    fields = (*_GATE_FIELDS, "d_model", "num_heads", "num_kv_heads", "head_dim")
    return {
        str(index): {name: mixer.to_dict()[name] for name in fields}
        for index, mixer in enumerate(model.config.mixers)
        if mixer.type == GATED
    }


def _without_beginnings(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The facts without what gates begin with, which matters no more once they are filled."""
    return {
        index: {name: value for name, value in entry.items() if name not in ("gate_bias", "train_length")}
        for index, entry in entries.items()
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
