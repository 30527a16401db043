"""Times of kernels and layers beside PyTorch's scaled_dot_product_attention (SDPA), for gpu_check.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.kernels import attention, available_backends, causal_conv, decode_attention, linear_attention
from memzoo.layers import TokenMixer, build_mixer, list_mixers
from memzoo.layers.registry import mixer_entry
from memzoo.testing import Subject, small_configs

# Dimensions: B batch, T tokens, H heads, D head width, S slots, M model width

# What a mixer gets where its config has such a field; everything else keeps its default.
FULL_SIZES = {
    "d_model": 1024,
    "num_heads": 16,
    "num_kv_heads": 16,
    "head_dim": 64,
    "window_size": 512,
    "num_sinks": 4,
    "chunk_size": 64,
}
QUICK_SIZES = {
    "d_model": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "window_size": 16,
    "num_sinks": 2,
    "chunk_size": 8,
}
BASELINE = "sdpa (full attention)"


@dataclass(frozen=True)
class Task:
    """Something to time; `measure` gives one row per function and mode."""

    name: str
    measure: Callable[[], list[dict[str, Any]]]


def tasks(device: torch.device, quick: bool) -> Iterable[Task]:
    """All timings of this device."""
    for tokens in (64,) if quick else (2048, 8192, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for operation, make in _KERNELS.items():
                yield Task(
                    f"{operation}, {tokens} tokens, {short}",
                    lambda o=operation, m=make, t=tokens, d=dtype: _time_kernel(o, m, t, d, device, quick),
                )
    dtype = torch.bfloat16
    for kind in list_mixers():
        yield Task(f"layer {kind}", lambda kind=kind: _time_layer(kind, device, dtype, quick))


def report(rows: list[dict[str, Any]]) -> str:
    """A table of the timings."""
    return common.table(
        [
            (
                row["what"],
                row["setting"],
                row["function"],
                row["mode"],
                float(row["median_ms"]),
                float(row["p90_ms"] - row["p10_ms"]),
                "-" if row["peak_bytes"] is None else round(row["peak_bytes"] / 2**20),
                float(row["times_sdpa"]) if row["times_sdpa"] else "-",
            )
            for row in rows
        ],
        ("what", "setting", "function", "mode", "ms", "spread", "peak MiB", "x sdpa"),
    )


def _rows(
    what: str,
    setting: str,
    mode: str,
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget_s: float,
    wall_clock: bool = False,
) -> list[dict[str, Any]]:
    """Time functions in turns; one row each, with the ratio to the baseline."""
    times = common.time_interleaved(functions, device=device, budget_s=budget_s, wall_clock=wall_clock)
    baseline = times[BASELINE]["median_ms"] if BASELINE in times else None
    return [
        {
            "what": what,
            "setting": setting,
            "mode": mode,
            "function": name,
            **taken,
            "peak_bytes": common.peak_memory(functions[name], device),
            "times_sdpa": None if baseline is None else taken["median_ms"] / baseline,
        }
        for name, taken in times.items()
    ]


# ---------------------------------------------------------------------------------------------- kernels

Call = Callable[[str], Tensor]  # backend -> output
Kernel = tuple[list[Tensor], Call, Callable[[], Tensor] | None]  # inputs, call, SDPA on the same inputs


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True) -> Tensor:
    """(B, T, H, D) in and out."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal)
    return out.transpose(1, 2)


def _qkv(device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]) -> list[Tensor]:
    shape = (1, tokens, sizes["num_heads"], sizes["head_dim"])
    return [_draw(device, dtype, *shape) for _ in range(3)]


def _full_attention(
    device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]
) -> Kernel:
    q, k, v = _qkv(device, dtype, tokens, sizes)
    return [q, k, v], lambda backend: attention(q, k, v, backend=backend).output, lambda: _sdpa(q, k, v)


def _window_attention(
    device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]
) -> Kernel:
    q, k, v = _qkv(device, dtype, tokens, sizes)
    options: dict[str, Any] = {"window_size": sizes["window_size"]}
    return (
        [q, k, v],
        lambda backend: attention(q, k, v, backend=backend, **options).output,
        lambda: _sdpa(q, k, v),
    )


def _window_and_sinks(
    device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]
) -> Kernel:
    q, k, v = _qkv(device, dtype, tokens, sizes)
    options: dict[str, Any] = {"window_size": sizes["window_size"], "num_sinks": sizes["num_sinks"]}
    return (
        [q, k, v],
        lambda backend: attention(q, k, v, backend=backend, **options).output,
        lambda: _sdpa(q, k, v),
    )


def _linear(device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]) -> Kernel:
    q, k, v = _qkv(device, dtype, tokens, sizes)
    g = -torch.rand(1, tokens, sizes["num_heads"], device=device)

    def call(backend: str) -> Tensor:
        return linear_attention(q, k, v, g=g, chunk_size=sizes["chunk_size"], backend=backend)[0]

    return [q, k, v], call, lambda: _sdpa(q, k, v)


def _conv(device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]) -> Kernel:
    x = _draw(device, dtype, 1, tokens, sizes["d_model"])
    weight = _draw(device, dtype, sizes["d_model"], 4)
    return [x, weight], lambda backend: causal_conv(x, weight, backend=backend)[0], None


def _decode(device: torch.device, dtype: torch.dtype, tokens: int, sizes: Mapping[str, int]) -> Kernel:
    heads, width = sizes["num_heads"], sizes["head_dim"]
    q = _draw(device, dtype, 8, 1, heads, width)
    k, v = (_draw(device, dtype, 8, tokens, heads, width) for _ in range(2))
    return (
        [q, k, v],
        lambda backend: decode_attention(q, k, v, backend=backend).output,
        lambda: _sdpa(q, k, v, is_causal=False),
    )


_KERNELS: dict[str, Callable[[torch.device, torch.dtype, int, Mapping[str, int]], Kernel]] = {
    "attention": _full_attention,
    "attention, window": _window_attention,
    "attention, window and sinks": _window_and_sinks,
    "causal_conv": _conv,
    "decode_attention": _decode,
    "linear_attention": _linear,
}


def _time_kernel(
    operation: str,
    make: Callable[[torch.device, torch.dtype, int, Mapping[str, int]], Kernel],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    quick: bool,
) -> list[dict[str, Any]]:
    inputs, call, sdpa = make(device, dtype, tokens, QUICK_SIZES if quick else FULL_SIZES)
    functions: dict[str, Callable[[], Tensor]] = {} if sdpa is None else {BASELINE: sdpa}
    for backend in available_backends(operation.split(",")[0]):
        if backend == "reference":
            continue
        try:
            call(backend)
        except ValueError:  # the backend does not cover this call
            continue
        functions[f"memzoo {backend}"] = lambda backend=backend: call(backend)
    setting = f"{tokens} tokens, {str(dtype).removeprefix('torch.')}"
    budget = 0.02 if quick else 0.5

    def forward(function: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                function()

        return run

    rows = _rows(
        operation,
        setting,
        "forward",
        {name: forward(function) for name, function in functions.items()},
        device,
        budget_s=budget,
    )
    if operation == "decode_attention":
        return rows
    grad = torch.randn_like(call("auto"))

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), inputs, grad)

    timed = {name: both(function) for name, function in functions.items()}
    return rows + _rows(operation, setting, "forward+backward", timed, device, budget_s=budget)


# ---------------------------------------------------------------------------------------------- layers


class SDPALayer(nn.Module):
    """Plain full attention: four projections around SDPA, and a cache of fixed size for single tokens."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, M) to (B, T, M)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(_sdpa(q, k, v).flatten(2))

    def step(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One token (B, 1, M) over cached keys and values (B, S, H, D), the last slot is written."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys[:, -1:], values[:, -1:] = k, v
        return self.o_proj(_sdpa(q, keys, values, is_causal=False).flatten(2))


def scaled_config(kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A config of a registered mixer: `sizes` where it has such fields, its defaults elsewhere."""
    small = small_configs(kind)[0]
    made: dict[str, Any] = {"type": kind}
    for item in dataclasses.fields(mixer_entry(kind).config):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if item.name == "mixers":
            made["mixers"] = [scaled_config(inner["type"], sizes) for inner in small["mixers"]]
        elif item.name in sizes:
            made[item.name] = sizes[item.name]
        elif required and item.name != "type":
            made[item.name] = small[item.name]
    return made


def _time_layer(kind: str, device: torch.device, dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK_SIZES if quick else FULL_SIZES
    rows, tokens = (2, 64) if quick else (8, 2048)
    config = scaled_config(kind, sizes)
    mixer: TokenMixer = build_mixer(config).to(device, dtype)
    plain = SDPALayer(sizes["d_model"], sizes["num_heads"]).to(device, dtype)
    streams = Subject(mixer, dtype=dtype, device=str(device)).streams(rows, tokens)
    x = _draw(device, dtype, rows, tokens, sizes["d_model"])
    grad = torch.randn_like(x)
    budget = 0.02 if quick else 0.5
    setting = f"{rows} x {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    name = f"memzoo {kind}"

    def forward() -> Tensor:
        return mixer(x, streams=streams).hidden

    def without_gradient(function: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                function()

        return run

    def with_gradient(module: nn.Module, function: Callable[[], Tensor]) -> Callable[[], object]:
        leaves = [x, *module.parameters()]
        return lambda: torch.autograd.grad(function(), leaves, grad, allow_unused=True)

    timed = _rows(
        f"layer {kind}",
        setting,
        "forward",
        {BASELINE: without_gradient(lambda: plain(x)), name: without_gradient(forward)},
        device,
        budget_s=budget,
    )
    timed += _rows(
        f"layer {kind}",
        setting,
        "forward+backward",
        {BASELINE: with_gradient(plain, lambda: plain(x)), name: with_gradient(mixer, forward)},
        device,
        budget_s=budget,
    )
    with torch.no_grad():
        holder = {"state": mixer(x, streams=streams, return_state=True).state}
        keys, values = (
            torch.randn(rows, tokens + 1, sizes["num_heads"], sizes["head_dim"], device=device, dtype=dtype)
            for _ in range(2)
        )
        token, one = x[:, 0].detach(), {key: stream[:, -1] for key, stream in streams.items()}

        def step() -> None:
            with torch.no_grad():
                holder["state"] = mixer.step(token, holder["state"], streams=one, donate=True).state

        timed += _rows(
            f"layer {kind}",
            f"{rows} sequences after {tokens} tokens, {str(dtype).removeprefix('torch.')}",
            "one token",
            {BASELINE: without_gradient(lambda: plain.step(token[:, None], keys, values)), name: step},
            device,
            budget_s=budget,
            wall_clock=True,
        )
    for row in timed:
        if row["function"] == name:
            row["config"] = config
    return timed
