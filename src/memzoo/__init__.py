"""Trainable memory architectures for long-context language models.

    memzoo.load(folder)                                  a model from a folder or a .gguf file
    memzoo.convert(folder, "hybrid", recipe="lolcats")   a pretrained model into a memory hybrid
    memzoo.swap(hf_model, {3: {"type": "based"}})        our mixers inside a plain transformers model
    memzoo.layers.build_mixer({...})                     one layer for a model of your own

Importing this package loads nothing but itself; each function brings what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .layers import MixerConfig
    from .models.decoder import MemoryLM

__version__ = "0.1.0.dev0"

__all__ = ["convert", "load", "swap"]


def load(
    source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> MemoryLM:
    """Loads a model: a folder saved by this library, a Llama-style Hugging Face folder, or a .gguf file.

    Args:
        source: the folder or file.
        dtype: of the weights; default float32.
        device: where to put it.

    Raises:
        ValueError: nothing readable there, damaged, or a model of another kind.
    """
    from .models.checkpoints.folder import load_model

    model = load_model(source) if dtype is None else load_model(source, dtype=dtype)
    return model.to(device).eval()


def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str], recipe: str = "lolcats", **options: Any
) -> str:
    """Converts a pretrained model into a memory hybrid and measures it; see `memzoo.train.commands.convert`.

    Args:
        source: folder of a Llama-style model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        output: folder for `hybrid/`, `control/` and `report.json`.
        recipe: a shipped recipe or a YAML file.
        options: further arguments of `memzoo.train.commands.convert`.

    Returns:
        the comparison as a table.
    """
    from .train.commands import convert as run

    return run(os.fspath(source), os.fspath(output), recipe, **options)


def swap(model: PreTrainedModel, mixers: Mapping[int, Mapping[str, Any] | MixerConfig]) -> PreTrainedModel:
    """Puts mixers of this library into a transformers model, in place; see `memzoo.models.swap.swap`.

    Args:
        model: a model of a Llama-style family.
        mixers: layer number -> mixer entry.
    """
    from .models.swap import swap as run

    return run(model, mixers)
