"""Reading long texts piece by piece, and keeping on disk where the reading stands.

A `Reading` is the state of a model after all tokens of a text but the last, and that last token. It is all
that generation needs to go on, in this process or in another one:

    reading = read_tokens(model, ids)
    save_reading(reading, "book.state", model)
    reading = load_reading("book.state", model)

The file is a safetensors file (`State.save`) that names the model it belongs to; that of another model or
tokenizer is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.contract import State, host_field
from .config import ModelConfig
from .decoder import MemoryLM, ModelState

# Dimensions: N sequences, T tokens

# Tokens read at once: bounds the memory of activations, changes no number.
CHUNK_SIZE = 1024
# Entries of a weight that go into its digest, evenly spaced.
_NUM_SAMPLES = 4096


@dataclass(kw_only=True)
class Reading(State):
    """Where the reading of a text stands; `num_tokens` counts the tokens that are in the state.

    Attributes:
        state: of the model, after all tokens but the last.
        last: (N, 1) int64 on the CPU, the last token of each sequence, which is not read yet: generation
            reads it first.
    """

    state: ModelState
    last: Tensor = host_field()

    @classmethod
    def of(cls, state: ModelState, last: Tensor) -> Reading:
        """A reading from a state and the (N, 1) or (N,) tokens after it."""
        return cls(num_tokens=state.num_tokens, state=state, last=last.reshape(-1, 1).to("cpu", torch.int64))


@torch.no_grad()
def read_tokens(
    model: MemoryLM,
    ids: Tensor,
    reading: Reading | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Reading:
    """Reads tokens in pieces, so that the memory needed does not grow with their number.

    Args:
        model: what reads, in evaluation mode.
        ids: (T,) or (N, T) integers.
        reading: where an earlier call, or a generation, stopped; None starts with an empty memory. It is
            not changed.
        chunk_size: tokens of one call of the model.
        on_chunk: called with (tokens read, tokens in all), for a progress line.

    Returns:
        where the reading stands now: everything is read but the last token.

    Raises:
        ValueError: no token, sizes that do not fit, or a state of another model.
    """
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or chunk_size < 1:
        raise ValueError(
            f"need ids (T,) or (N, T) and chunk_size >= 1, got {tuple(ids.shape)} and {chunk_size}."
        )
    if reading is not None:
        if len(reading.last) != len(ids):
            raise ValueError(
                f"the reading has {len(reading.last)} sequences, the tokens have {len(ids)}. "
                "Give one row of tokens per sequence; reading.select(rows) keeps some."
            )
        ids = torch.cat([reading.last, ids.cpu()], dim=1)
    if ids.shape[1] == 0:
        raise ValueError("there is no token to read. Give at least one, a bos token for instance.")
    weight = model.embed_tokens.weight
    state = None if reading is None else reading.state
    total = ids.shape[1] - 1
    for low in range(0, total, chunk_size):
        piece = ids[:, low : min(low + chunk_size, total)].to(weight.device)
        state = model(piece, state, return_state=True, last_only=True).state
        if on_chunk is not None:
            on_chunk(low + piece.shape[1], total)
    if state is None:
        state = model.init_state(len(ids), device=weight.device, dtype=weight.dtype)
    return Reading.of(state, ids[:, -1])


def save_reading(
    reading: Reading,
    path: str | os.PathLike[str],
    model: MemoryLM,
    tokenizer: Any = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a reading and what identifies its model; the file appears whole or not at all.

    Args:
        reading: what to keep.
        path: file to write.
        model: the model that read.
        tokenizer: a fast transformers tokenizer, to have texts of another one refused.
        notes: further short texts; `State.read_notes` returns them.
    """
    reading.save(path, {**model_fingerprint(model), **_of_tokenizer(tokenizer), **(notes or {})})


def load_reading(path: str | os.PathLike[str], model: MemoryLM, tokenizer: Any = None) -> Reading:
    """Reads what `save_reading` wrote, onto the device of the model.

    Raises:
        ValueError: no such file, damaged, no reading, or of another model, dtype or tokenizer.
    """
    check_reading(path, {**model_fingerprint(model), **_of_tokenizer(tokenizer)})
    found = Reading.load(path, model.embed_tokens.weight.device)
    if not isinstance(found, Reading):
        raise ValueError(_no_reading(path, f"a {type(found).__name__}"))
    return found


def check_reading(path: str | os.PathLike[str], expected: Mapping[str, str]) -> dict[str, str]:
    """Compares what a file says of its model with what is expected; the state itself is not read.

    Args:
        path: what `save_reading` wrote.
        expected: parts of the fingerprint, such as `config_fingerprint(config)` before weights are loaded.

    Returns:
        all notes of the file.

    Raises:
        ValueError: no such file, no reading, damaged, or of another model.
    """
    notes = Reading.read_notes(path)
    if not {"config", "weights", "dtype"} <= set(notes):
        raise ValueError(_no_reading(path, "a state that names no model"))
    for part, value in expected.items():
        if notes.get(part, value) != value:
            other = "are not those here" if part == "weights" else "is not the one here"
            differs = f"({notes[part]}, here {value})" if part == "dtype" else other
            raise ValueError(
                f"the state in {os.fspath(path)!r} is of another model: its {part} {differs}. "
                "Read the text again with this model, into another file."
            )
    return notes


def config_fingerprint(config: ModelConfig) -> dict[str, str]:
    """The digest of a model config, as `save_reading` keeps it."""
    content = json.dumps(config.to_dict(), sort_keys=True)
    return {"config": hashlib.sha256(content.encode()).hexdigest()}


def model_fingerprint(model: MemoryLM) -> dict[str, str]:
    """Digests of config and weights, and the dtype: equal for two copies of one model, whatever their files.

    Of each weight 4,096 evenly spaced entries count, which takes milliseconds and meets every tuned matrix.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _NUM_SAMPLES)].cpu()
        sample = sample.clone(memory_format=torch.contiguous_format)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(sample.view(torch.uint8).numpy().data)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {**config_fingerprint(model.config), "weights": found.hexdigest(), "dtype": dtype}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short digest of the vocabulary and the rules of a fast transformers tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def _of_tokenizer(tokenizer: Any) -> dict[str, str]:
    return {} if tokenizer is None else {"tokenizer": tokenizer_fingerprint(tokenizer)}


def _no_reading(path: str | os.PathLike[str], what: str) -> str:
    return (
        f"{os.fspath(path)!r} holds {what}, expected a file written by `memzoo generate --state` or "
        "save_reading. Name another file."
    )
