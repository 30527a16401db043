"""How fast a model reads and writes after contexts of several lengths, and what memory that needs."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.decoder import MemoryLM, ModelState

# Dimensions: N sequences, T tokens


@torch.no_grad()
def measure_speed(
    model: MemoryLM,
    lengths: Sequence[int] = (256, 1024, 4096),
    *,
    batch_size: int = 1,
    chunk_size: int = 1024,
    decode_tokens: int = 16,
    repetitions: int = 3,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Reads random tokens up to each length, and decodes some more there, in turns over the lengths.

    Args:
        model: what is measured, where it is, in its dtype.
        lengths: tokens in front of the decoded ones.
        batch_size: sequences at once.
        chunk_size: tokens of one call while a context is read.
        decode_tokens: tokens decoded one by one in a timed run.
        repetitions: timed runs of each kind after one that is not timed; medians count.
        seed: of the tokens.
        on_step: called with (runs done, runs in all), for a progress line.

    Returns:
        per length, ascending: `prefill_tokens_per_second` and `decode_tokens_per_second` (of all sequences
        together), `prefill_seconds` and `decode_seconds_per_token` (median, least and most of a run),
        `state_bytes` as measured, `declared_state_bytes`, and `peak_bytes`, what reading the context needs
        beyond the model (None where the system does not tell).

    Raises:
        ValueError: a size below 1, or no length.
    """
    sizes = {"batch_size": batch_size, "chunk_size": chunk_size, "decode_tokens": decode_tokens}
    check_sizes(lengths, repetitions=repetitions, **sizes)
    contexts = sorted(set(lengths))
    weight = model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, contexts[-1] + decode_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(weight.device)
    total, done = 2 * len(contexts) * (repetitions + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    was_training = model.training
    model.eval()
    try:
        states: dict[int, ModelState] = {}
        peaks: dict[int, int | None] = {}

        def keep(length: int) -> None:
            states[length] = _prefill(model, ids[:, :length], chunk_size)

        for length in contexts:
            _prefill(model, ids[:, : min(length, chunk_size)], chunk_size)
            peaks[length] = peak_memory(partial(keep, length), weight.device)
            advance()
        reading: dict[int, list[float]] = {length: [] for length in contexts}
        for _ in range(repetitions):
            for length in contexts:
                run = partial(_prefill, model, ids[:, :length], chunk_size)
                reading[length].append(_seconds(run, weight.device))
                advance()
        writing: dict[int, list[float]] = {length: [] for length in contexts}
        for count in range(repetitions + 1):
            for length in contexts:
                steps = ids[:, length : length + decode_tokens]
                write = partial(_decode, model, steps, states[length].clone())
                taken = _seconds(write, weight.device)
                if count:  # the first round warms up
                    writing[length].append(taken / decode_tokens)
                advance()
    finally:
        model.train(was_training)
    return [
        {
            "length": length,
            "prefill_tokens_per_second": batch_size * length / statistics.median(reading[length]),
            "decode_tokens_per_second": batch_size / statistics.median(writing[length]),
            "prefill_seconds": _spread(reading[length]),
            "decode_seconds_per_token": _spread(writing[length]),
            "state_bytes": states[length].num_bytes(),
            "declared_state_bytes": model.state_num_bytes(length, batch_size, weight.dtype),
            "peak_bytes": peaks[length],
        }
        for length in contexts
    ]


def check_sizes(lengths: Sequence[int], **sizes: int) -> None:
    """Raises ValueError when a size of a measurement is below 1, or there is no length."""
    if not lengths:
        raise ValueError("lengths is empty. Give at least one, for example [1024].")
    for name, size in (*sizes.items(), *(("lengths", length) for length in lengths)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a run needs at most beyond what is held before it.

    On CUDA exact, from the allocator. On the CPU the growth of the resident set (Linux; None elsewhere):
    right to a few megabytes, so ask it about large tensors only, and after a first call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
        held = resident_bytes()
    except (AttributeError, OSError):
        function()
        return None
    function()
    return max(0, _status_bytes("VmHWM") - held)


def resident_bytes() -> int:
    """Memory of this process that lies in RAM (Linux).

    Raises:
        OSError: the system does not say.
    """
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the system does not report {name}")
    return int(found.group(1)) << 10


def _prefill(model: MemoryLM, ids: Tensor, chunk_size: int) -> ModelState:
    """Reads (N, T) tokens from an empty memory, in pieces."""
    state: ModelState | None = None
    for piece in ids.split(chunk_size, dim=1):
        state = model(piece, state, return_state=True, last_only=True).state
    assert state is not None
    return state


def _decode(model: MemoryLM, ids: Tensor, state: ModelState) -> None:
    """Reads (N, T) tokens one by one, as decoding does; the state is used up."""
    for column in ids.unbind(1):
        after = model.step(column, state, donate=True).state
        assert after is not None
        state = after


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    clock = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - clock


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
