"""Time and memory of the kernels beside what PyTorch and flash-linear-attention offer for the same function.

    python benchmarks/kernels.py                       everything, up to 32k tokens
    python benchmarks/kernels.py --max-length 4096     short sequences only
    python benchmarks/kernels.py --only linear         one part: attention, linear or decode
    python benchmarks/kernels.py --quick               to try the script

attention   windows of 64, 256 and 1,024 keys beside full causal attention and an explicit window mask, both
            by torch's scaled_dot_product_attention (SDPA), forward and with the backward pass, time and
            peak memory; the mask is made before, its memory is counted
linear      linear attention, plain, decayed and normalised, beside the plain PyTorch functions of
            flash-linear-attention (its kernels need a GPU) where it can be imported, and as a share of the
            rate of batched matmuls of the machine, measured in the same run; with the error of each against
            the definition in float64
decode      one token against caches of 1k and 64k tokens: a window, full attention by us and by SDPA

A combination that would need more memory or time than the limits is named in the record with its reason.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import attention, decode_attention, linear_attention

# Dimensions: B batch, T tokens, H heads, D head width, K key width, V value width, S slots, C chunk length

NUM_HEADS, HEAD_DIM = 8, 64
WINDOWS = (64, 256, 1024)
MASK_WINDOW = 256
KEY_WIDTHS = (64, 128, 256)
CHUNK_SIZE = 64
ERROR_TOKENS = 1024  # of linear attention, compared with the definition
DTYPES = (torch.float32, torch.bfloat16)
MODES = ("forward", "forward+backward")
PARTS = ("attention", "linear", "decode")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and write the record; 0 when all went well."""
    made = common.parser(__doc__.splitlines()[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run this part (may be repeated)")
    made.add_argument("--max-length", type=int, default=32768, help="longest sequence (default: %(default)s)")
    made.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        help="skip a call expected to take longer (default: %(default)s)",
    )
    made.add_argument(
        "--max-gib", type=float, default=8.0, help="skip a call expected to need more (default: %(default)s)"
    )
    made.add_argument(
        "--budget", type=float, default=4.0, help="seconds to time each function for (default: %(default)s)"
    )
    options = made.parse_args(arguments)
    if options.quick:
        options.max_length, options.budget = 256, 0.02
    device = common.prepare(options)
    parts = options.only or list(PARTS)
    results: dict[str, list[Row]] = {}
    for part, measure in (("attention", _attention), ("linear", _linear), ("decode", _decode)):
        if part in parts:
            results[part] = []
            for row in measure(device, options):
                results[part].append(row)
                print(_sentence(row), flush=True)
    config = {
        "batch": 1,
        "heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "max_length": options.max_length,
        "max_seconds": options.max_seconds,
        "max_gib": options.max_gib,
        "budget_s": options.budget,
        "warmup": 1,
        "flash_linear_attention": _fla_version(),
    }
    path = common.save(options, "kernels", config, results)
    if path is not None:
        print(f"wrote {path}")
    return 0


def _sentence(row: Row) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
    if "skipped" in row:
        return f"{row['function']} ({setting}): skipped, {row['skipped']}"
    extra = "".join(
        f", {key} {row[key]:.3g}"
        for key in ("peak_mib", "gflops", "share_of_matmul_rate", "relative_error")
        if row.get(key) is not None
    )
    return (
        f"{row['function']} ({setting}): {row['median_ms']:.4g} ms "
        f"[{row['p10_ms']:.4g} .. {row['p90_ms']:.4g}]{extra}"
    )


def _fla_version() -> str:
    """Version of flash-linear-attention, or why its plain functions cannot be used here."""
    try:
        importlib.import_module("fla.ops.linear_attn.naive")
        return str(importlib.import_module("fla").__version__)
    except (ImportError, RuntimeError) as error:
        return f"not used: {error}"


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def _in_mode(mode: str, function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The call to time: without a graph, or with the gradients of all inputs."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function()

        return forward

    def both() -> tuple[Tensor, ...]:
        output = function()
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    return both


def _measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget_s: float, with_memory: bool
) -> Iterator[tuple[str, Row]]:
    """Times of several functions taken in turns, and the peak memory of each."""
    times = common.time_interleaved(
        calls, device=device, budget_s=budget_s, warmup=1, min_repeats=3, max_repeats=20
    )
    for name, taken in times.items():
        row: Row = dict(taken)
        if with_memory:
            peak = common.peak_memory(calls[name], device)
            row["peak_mib"] = None if peak is None else peak / 2**20
        yield name, row


# -------------------------------------------------------------------------------------------- attention


def _attention(device: torch.device, options: Any) -> Iterator[Row]:
    lengths = [n for n in (256, 1024, 2048, 4096, 8192, 16384, 32768) if n <= options.max_length]
    lengths = lengths if options.quick else lengths[1:]
    last: dict[tuple[str, str, torch.dtype], float] = {}
    masked = f"sdpa, mask of window {MASK_WINDOW}"
    for length in lengths:
        for dtype in DTYPES:
            q, k, v = inputs = [_draw(device, dtype, 1, length, NUM_HEADS, HEAD_DIM) for _ in range(3)]
            functions = {f"window {size}": _window(q, k, v, size) for size in WINDOWS}
            functions["sdpa, causal"] = _sdpa(q, k, v)
            # the mask and what SDPA makes of it, numbers of the dtype
            mask_gib = length**2 * (1 + q.element_size()) / 2**30
            if mask_gib <= options.max_gib:
                functions[masked] = _sdpa(q, k, v, _window_mask(length, device))
            for mode in MODES:
                setting = {"tokens": length, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
                calls = {}
                if masked not in functions:
                    reason = f"about {mask_gib:.1f} GiB expected, limit {options.max_gib:g}"
                    yield {"function": masked, "setting": setting, "skipped": reason}
                for name, function in functions.items():
                    growth = 2 if name.startswith("window") else 4
                    seconds = last.get((name, mode, dtype), 0.0) * growth
                    if seconds > options.max_seconds:
                        reason = f"about {seconds:.0f} s expected, limit {options.max_seconds:g}"
                        yield {"function": name, "setting": setting, "skipped": reason}
                    else:
                        calls[name] = _in_mode(mode, function, inputs)
                for name, row in _measure(calls, device, options.budget, with_memory=True):
                    last[name, mode, dtype] = row["median_ms"] / 1e3
                    if name == masked and row["peak_mib"] is not None:
                        row["peak_mib"] += length**2 / 2**20  # the mask is held, so not seen as growth
                    yield {"function": name, "setting": setting, **row}


def _window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Callable[[], Tensor]:
    return lambda: attention(q, k, v, window_size=size, backend="torch").output


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    return call


def _window_mask(length: int, device: torch.device) -> Tensor:
    """(T, T) bool, True where a token sees a key; made once, as a model would."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - MASK_WINDOW)


# ------------------------------------------------------------------------------------- linear attention


def _linear(device: torch.device, options: Any) -> Iterator[Row]:
    length = min(options.max_length, 4096)
    for dtype in DTYPES:
        for width in KEY_WIDTHS[:1] if options.quick else KEY_WIDTHS:
            rate = _matmul_rate(device, dtype, width, length, options.budget)
            setting = {
                "tokens": length,
                "K": width,
                "V": HEAD_DIM,
                "dtype": str(dtype).removeprefix("torch."),
            }
            for name, row in rate.items():
                yield {"function": name, "setting": setting, **row}
            best = max(row["gflops"] for row in rate.values())
            q, k, v = (_draw(device, dtype, 1, length, NUM_HEADS, n) for n in (width, width, HEAD_DIM))
            g = (-0.1 * torch.rand(1, length, NUM_HEADS, device=device)).to(dtype).requires_grad_()
            # per token: inside a chunk C (K + V) multiply-adds, into and out of the state 2 K V
            flops = 2 * NUM_HEADS * length * (CHUNK_SIZE * (width + HEAD_DIM) + 2 * width * HEAD_DIM)
            errors = _linear_errors(q, k, v, g)
            for mode in MODES:
                calls = {
                    name: _in_mode(mode, function, [q, k, v, *([g] if "decay" in name else [])])
                    for name, function in _linear_functions(q, k, v, g).items()
                }
                for name, row in _measure(calls, device, options.budget, with_memory=True):
                    # a backward pass is counted as twice the forward pass, what it recomputes is not counted
                    done = flops * (1 if mode == "forward" else 3) / row["median_ms"] / 1e6
                    row = {
                        **row,
                        "gflops": done,
                        "share_of_matmul_rate": done / best,
                        "relative_error": errors[name],
                    }
                    yield {"function": name, "setting": {**setting, "mode": mode}, **row}


def _linear_errors(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, float]:
    """Root mean square error of each function over that of the definition in float64, on the first tokens."""
    first = [x.detach()[:, :ERROR_TOKENS] for x in (q, k, v, g)]
    wide_q, wide_k, wide_v, wide_g = (x.double() for x in first)
    plain = linear_attention(wide_q, wide_k, wide_v, backend="reference")[0]
    truths = {
        "normalised": linear_attention(
            wide_q.square(), wide_k.square(), wide_v, normalize=True, backend="reference"
        )[0],
        "decay": linear_attention(wide_q, wide_k, wide_v, g=wide_g, backend="reference")[0],
    }
    found = {}
    with torch.no_grad():
        for name, function in _linear_functions(*first).items():
            truth = truths.get(name.rpartition(", ")[2], plain)
            found[name] = float((function().double() - truth).square().mean().sqrt())
            found[name] /= float(truth.square().mean().sqrt())
    return found


def _linear_functions(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    options: dict[str, Any] = {"chunk_size": CHUNK_SIZE, "backend": "torch"}
    functions: dict[str, Callable[[], Tensor]] = {
        "linear_attention": lambda: linear_attention(q, k, v, **options)[0],
        "linear_attention, decay": lambda: linear_attention(q, k, v, g=g, **options)[0],
        "linear_attention, normalised": lambda: linear_attention(
            q.square(), k.square(), v, normalize=True, **options
        )[0],
    }
    try:
        plain = importlib.import_module("fla.ops.linear_attn.naive").naive_chunk_linear_attn
        decayed = importlib.import_module("fla.ops.simple_gla.naive").naive_chunk_simple_gla
    except (ImportError, RuntimeError):
        return functions

    def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    return {
        **functions,
        "flash-linear-attention, naive chunks": lambda: output(plain(q, k, v)),
        "flash-linear-attention, naive chunks, decay": lambda: output(decayed(q, k, v, g)),
    }


def _matmul_rate(
    device: torch.device, dtype: torch.dtype, width: int, length: int, budget_s: float
) -> dict[str, Row]:
    """GFLOP/s of batched matmuls: of the four shapes of linear attention, and of 256 times 64 x 64 x 64."""
    batch = NUM_HEADS * math.ceil(length / CHUNK_SIZE)
    shapes = {
        "matmuls of the same shapes": [
            (batch, CHUNK_SIZE, width, CHUNK_SIZE),
            (batch, CHUNK_SIZE, CHUNK_SIZE, HEAD_DIM),
            (batch, CHUNK_SIZE, width, HEAD_DIM),
            (batch, width, CHUNK_SIZE, HEAD_DIM),
        ],
        "matmuls 256 x (64 x 64 x 64)": [(256, 64, 64, 64)],
    }
    calls, flops = {}, {}
    for name, members in shapes.items():
        pairs = [
            (
                torch.randn(b, m, n, device=device, dtype=dtype),
                torch.randn(b, n, p, device=device, dtype=dtype),
            )
            for b, m, n, p in members
        ]
        flops[name] = sum(2 * b * m * n * p for b, m, n, p in members)
        calls[name] = lambda pairs=pairs: [torch.bmm(a, b) for a, b in pairs]
    return {
        name: {**row, "gflops": flops[name] / row["median_ms"] / 1e6}
        for name, row in _measure(calls, device, budget_s, with_memory=False)
    }


# ----------------------------------------------------------------------------------------------- decode


def _decode(device: torch.device, options: Any) -> Iterator[Row]:
    contexts = (128, 256) if options.quick else (1024, 65536)
    whole: dict[str, int | None] = dict.fromkeys(("full attention", "sdpa"))
    windows: dict[str, int | None] = {f"window {size}": size for size in WINDOWS}
    # not in turns with each other: the long caches would push the windows out of the processor's own
    for group in (windows, whole):
        for dtype in DTYPES:
            for num_kv_heads in (NUM_HEADS, NUM_HEADS // 4):
                calls: dict[str, Callable[[], object]] = {}
                settings: dict[str, Row] = {}
                for context in contexts:
                    q = torch.randn(1, 1, NUM_HEADS, HEAD_DIM, device=device, dtype=dtype)
                    for name, size in group.items():
                        count = context if size is None else min(size, context)
                        k, v = (
                            torch.randn(1, count, num_kv_heads, HEAD_DIM, device=device, dtype=dtype)
                            for _ in range(2)
                        )
                        key = f"{name}, {context}"
                        calls[key] = _decode_call(name, q, k, v)
                        settings[key] = {
                            "context": context,
                            "kv_heads": num_kv_heads,
                            "dtype": str(dtype).removeprefix("torch."),
                            "function": name,
                        }
                for key, row in _measure(calls, device, options.budget, with_memory=False):
                    setting = dict(settings[key])
                    yield {"function": setting.pop("function"), "setting": setting, **row}


def _decode_call(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        if name != "sdpa":
            return decode_attention(q, k, v).output
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, enable_gqa=q.shape[2] != k.shape[2])

    return call


if __name__ == "__main__":
    raise SystemExit(main())
