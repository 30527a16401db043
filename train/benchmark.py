"""Time one mixer beside full attention of the same width."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..layers import TokenMixer, build_mixer
from ..layers.registry import mixer_entry

BASELINE = "attention"
_HEAD_DIM = 64


def time_mixer(
    mixer: str,
    *,
    d_model: int = 512,
    lengths: Sequence[int] = (1024, 2048, 4096),
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    repetitions: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Milliseconds for forward, forward + backward, and one token decoded after each length.

    Args:
        mixer: registered type.
        d_model: width.
        lengths: tokens read.
        batch_size: sequences.
        settings: fields of the mixer; heads of width 64 where it has heads and none are given.
        repetitions: timed runs after one warm-up.
        threads: CPU threads; None leaves torch's choice.
        device: where to run.
        dtype: precision.

    Returns:
        rows of a table (header first), and the figures as plain data.

    Raises:
        ValueError: unknown mixer or field (the nearest is named), or a size below 1.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("repetitions", repetitions),
        ("threads", 1 if threads is None else threads),
        *(("lengths", n) for n in lengths),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if threads is not None:
        torch.set_num_threads(threads)
    built = {mixer: _build(mixer, d_model, settings or {}, device, dtype)}
    if mixer != BASELINE:
        built[BASELINE] = _build(BASELINE, d_model, {}, device, dtype)
    header = ("mixer", "tokens", "forward ms", "+ backward ms", "step ms", "state bytes")
    rows: list[tuple[str, ...]] = [header]
    figures = []
    for length in lengths:
        for name, layer in built.items():
            figure = _time(layer, length, batch_size, repetitions) | {"mixer": name, "num_tokens": length}
            figures.append(figure)
            rows.append(
                (
                    name,
                    f"{length:,}",
                    *(f"{figure[key]['median_ms']:.2f}" for key in ("forward", "forward_backward", "step")),
                    f"{figure['state_num_bytes']:,}",
                )
            )
    return rows, {"figures": figures}


def _build(name: str, d_model: int, settings: Mapping[str, Any], device: str, dtype: str) -> TokenMixer:
    fields = set(mixer_entry(name).config.__dataclass_fields__)
    given = dict(settings)
    if "num_heads" in fields:
        given.setdefault("num_heads", max(1, d_model // _HEAD_DIM))
    layer = build_mixer({"type": name, "d_model": d_model} | given)
    return layer.to(device=device, dtype=getattr(torch, dtype))


def _time(layer: TokenMixer, length: int, batch_size: int, repetitions: int) -> dict[str, Any]:
    weight = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, length, layer.d_model, generator=generator).to(weight)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def forward_backward() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x.requires_grad_()).hidden.float().square().mean().backward()

    with torch.no_grad():
        state = layer(x, return_state=True).state

    def step() -> None:
        with torch.no_grad():
            layer.step(x[:, 0].detach(), state)

    return {
        "forward": _median(forward, repetitions, weight.device),
        "forward_backward": _median(forward_backward, repetitions, weight.device),
        "step": _median(step, max(repetitions, 10), weight.device),
        "state_num_bytes": state.num_bytes(),
    }


def _median(run: Callable[[], None], repetitions: int, device: torch.device) -> dict[str, float]:
    """Median and spread in milliseconds, after one warm-up."""
    run()
    times = []
    for _ in range(repetitions):
        _wait(device)
        clock = time.perf_counter()
        run()
        _wait(device)
        times.append((time.perf_counter() - clock) * 1000)
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
