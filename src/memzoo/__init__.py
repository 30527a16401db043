"""Trainable memory architectures for long-context language models.

    memzoo.load(folder)                                  a model from a folder or a .gguf file
    memzoo.save(model, folder, tokenizer)                a folder that load, transformers and `memzoo` read
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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .layers import MixerConfig
    from .models.decoder import MemoryLM

__version__ = "0.1.0.dev0"

__all__ = ["convert", "load", "save", "swap"]


def load(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, device: str = "cpu"
) -> MemoryLM:
    """Loads a model: a folder saved by this library, a Llama-style Hugging Face folder, or a .gguf file.

    Args:
        source: the folder or file, or "smollm2-135m" (fetched once into the cache).
        dtype: of the weights, such as torch.bfloat16 or "bfloat16"; default as stored (.gguf: float32).
        device: where to put it.

    Raises:
        ValueError: nothing readable there, damaged, or a model of another kind; an unknown dtype; or a CUDA
            device where torch finds none.
    """
    import torch

    from .models.checkpoints.fetch import locate
    from .models.checkpoints.folder import load_model

    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ValueError(
            f"dtype must be a floating-point dtype of torch or its name, such as 'bfloat16', got {dtype!r}."
        )
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch finds no CUDA device. Use 'cpu'.")
    return load_model(locate(source), dtype=chosen, device=device).eval()


def save(
    model: MemoryLM,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Saves a model as a folder for `load`, the commands and, after `import memzoo.models.hf`, transformers.

    Args:
        model: what to save, in its dtype.
        folder: made if it is not there.
        tokenizer: to lie beside the model, which the commands want: a transformers tokenizer, or where to
            find one: the folder or .gguf file that the model was loaded from, "smollm2-135m", or "bytes".
        overwrite: replace what is in the folder; a kill meanwhile leaves the old model or the new one.

    Raises:
        ValueError: something lies in the folder already, or there is no such tokenizer.
    """
    from .models.checkpoints.fetch import locate
    from .models.hf import save_model
    from .records import refuse_content, results_folder
    from .train.data.tokenizers import load_tokenizer

    if not overwrite and not os.path.isfile(folder):
        refuse_content(folder)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(str(locate(tokenizer)))
    results_folder(folder)
    save_model(model, folder, tokenizer)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: str | os.PathLike[str] = "lolcats",
    **options: Any,
) -> str:
    """Converts a pretrained model into a memory hybrid and measures it.

    What the command does: see `memzoo.train.convert_command.convert`.

    Args:
        source: folder of a Llama-style model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        output: folder for `hybrid/`, `control/` and `report.json`.
        recipe: a shipped recipe or a YAML file.
        options: further arguments of `memzoo.train.convert_command.convert`.

    Returns:
        the comparison as a table, and where the model is.
    """
    if not isinstance(recipe, (str, os.PathLike)):
        raise TypeError(
            f"recipe must be the name of a shipped recipe or a YAML file, got {type(recipe).__name__}. "
            "Write its fields into a .yaml file and name that."
        )
    from .train.convert_command import convert as run

    return run(os.fspath(source), os.fspath(output), os.fspath(recipe), **options)


def swap(model: PreTrainedModel, mixers: Mapping[int, Mapping[str, Any] | MixerConfig]) -> PreTrainedModel:
    """Puts mixers of this library into a transformers model, in place; see `memzoo.models.swap.swap`.

    Args:
        model: a model of a Llama-style family.
        mixers: layer number -> mixer entry.
    """
    from .models.swap import swap as run

    return run(model, mixers)
