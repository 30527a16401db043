"""Time and memory of whole layers beside full attention and what is public for a CPU.

    python benchmarks/mixers.py                                          everything, up to 32k tokens
    python benchmarks/mixers.py --only mamba2 --only gated_delta_net     some mixers (and full attention)
    python benchmarks/mixers.py --max-length 2048 --dtype float32
    python benchmarks/mixers.py --quick                                  to try the script

One layer of width 512 with heads of 64 reads one sequence: forward, forward with the backward pass to input
and weights, and one decoded token after short and long contexts, all in turns. Beside them
(`mixer_peers.py`): the layers of transformers, with as many parameters as ours of the same name, the
projections of such layers alone, and, between projections, the plain functions of flash-linear-attention
where it can be imported (its layers need a GPU). What a layer cannot do within the limits of time and memory
is named in the record with its reason. The recurrences of Mamba-2 and Gated DeltaNet are timed alone as well
(`mixer_operations.py`). At the end the figures are held against what the project wants.

What belongs together, one length in one precision, is timed together and kept in `--runs`: a run that was
stopped goes on there as long as the sources are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import common
import mixer_operations
import points
import torch
from mixer_peers import PEERS, Projections
from torch import Tensor, nn

from memzoo.layers import TokenMixer, build_mixer, list_mixers
from memzoo.layers.registry import mixer_entry
from memzoo.records import git_commit

# Dimensions: B batch, T tokens, M model width

WIDTH, HEAD_DIM = 512, 64
LENGTHS = (512, 2048, 8192, 32768)
CONTEXTS = (1024, 65536)  # tokens read before a decoded one
PIECE = 1024  # tokens of one call while a context is read
DTYPES = ("float32", "bfloat16")
MODES = ("forward", "forward+backward")
BASELINE = "attention"
SETTINGS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window_size": 256},
    "lolcats": {"num_sinks": 4},
    "allmem": {"window_size": 256, "num_sinks": 4, "chunk_size": 256},
    "lact": {"window_size": 256, "chunk_size": 256},
    "fast_weight_memory": {"chunk_size": 256},
    "bmojo": {
        "window_size": 256,
        "eidetic_size": 64,
        "mixers": [{"type": "gated_delta_net", "num_heads": 8}],
    },
    "memory_as_context": {"mixers": [{"type": "titans", "num_heads": 8, "chunk_size": 256}]},
}
# what the project wants: mixer -> at least this multiple of the speed of the other, forward+backward
WANTED_AT_2K: dict[str, tuple[str, str, float]] = {
    "mamba2": ("transformers Mamba-2", "float32", 3.0),
    "gated_delta_net": ("transformers Gated DeltaNet", "float32", 3.0),
    "linear_attention": (BASELINE, "bfloat16", 1.0),
    "delta_net": (BASELINE, "bfloat16", 0.5),
    "mamba1": (BASELINE, "bfloat16", 0.2),
}
# whose projections are timed alone: what remains of the time is all that an implementation can change
COMPARED = ("mamba2", "gated_delta_net")
WANTED_OF_OPERATIONS = 3.0  # speed over the functions of transformers, 2,048 tokens
WANTED_TOKENS_PER_SECOND = {"mamba1": 4000.0}  # float32, forward+backward, 2,048 tokens
MOST_GROWTH = 4.4  # from 8k to 32k tokens
MOST_DECODE_GROWTH = 1.1  # of a token after 65,536 tokens against one after 1,024

Row = dict[str, Any]
Layer = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and write the record; 0 when all went well."""
    made = common.parser(__doc__.splitlines()[0])
    made.add_argument("--only", action="append", help="this mixer or peer (may be repeated)")
    made.add_argument("--dtype", choices=DTYPES, action="append", help="this precision (default: both)")
    made.add_argument(
        "--max-length", type=int, default=LENGTHS[-1], help="longest sequence (default: %(default)s)"
    )
    made.add_argument(
        "--max-seconds",
        type=float,
        default=15.0,
        help="skip a call expected to take longer (default: %(default)s)",
    )
    made.add_argument(
        "--max-gib", type=float, default=8.0, help="skip a call expected to need more (default: %(default)s)"
    )
    made.add_argument(
        "--budget", type=float, default=2.0, help="seconds to time each call for (default: %(default)s)"
    )
    made.add_argument(
        "--runs", type=Path, default=Path("runs/mixers"), help="folder of what is done (default: %(default)s)"
    )
    options = made.parse_args(arguments)
    device = common.prepare(options)
    width, head_dim = WIDTH, HEAD_DIM
    lengths: Sequence[int] = LENGTHS
    contexts: Sequence[int] = CONTEXTS
    if options.quick:
        width, head_dim, lengths, contexts, options.budget = 32, 8, (32, 64), (48, 96), 0.01
    chosen = subjects(width, head_dim, options.only)
    rows: list[Row] = []
    skipped: list[Row] = []
    operations: list[Row] = []
    for dtype in options.dtype or DTYPES:
        layers = {}
        for name, make in chosen.items():
            try:
                layers[name] = make().to(device, getattr(torch, dtype))
            except ImportError as error:
                skipped.append({"mixer": name, "dtype": dtype, "skipped": f"cannot be imported: {error}"})
                print(f"{name}: skipped, {skipped[-1]['skipped']}", flush=True)
        keep = _keeper(layers, dtype, device, options)
        found = _parallel(
            layers, dtype, [n for n in lengths if n <= options.max_length], device, options, keep
        )
        decoded = keep("decode", partial(_decode, layers, dtype, contexts, device, options))
        for row in chain(found, decoded):
            (skipped if "skipped" in row else rows).append(row)
            print(_sentence(row), flush=True)
        if not options.only:
            operations += keep("operations", partial(_operations, dtype, lengths, device, options))
    checks = [] if options.quick else [*checked(rows), *_checked_operations(operations)]
    for check in checks:
        print(
            f"{'reached' if check['reached'] else 'MISSED'}: {check['what']}: {check['value']:.3g} "
            f"({check['bound']} {check['wanted']:g})"
        )
    config = {
        "width": width,
        "head_dim": head_dim,
        "batch": 1,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "max_seconds": options.max_seconds,
        "max_gib": options.max_gib,
        "budget_s": options.budget,
        "mixers": {
            name: layer.config.to_dict() for name, layer in layers.items() if isinstance(layer, TokenMixer)
        },
    }
    results = {"rows": rows, "operations": operations, "skipped": skipped, "wanted": checks}
    path = common.save(options, "mixers", config, results)
    if path is not None:
        print(f"wrote {path}")
    return 0


# ---------------------------------------------------------------------------------------------- subjects


def subjects(width: int, head_dim: int, only: Sequence[str] | None) -> dict[str, Callable[[], nn.Module]]:
    """Name -> function that builds the layer; full attention comes first and is always there.

    Raises:
        SystemExit: a name that does not exist.
    """
    simple = [
        name
        for name in list_mixers()
        if "mixers" not in mixer_entry(name).config.__dataclass_fields__ or name in SETTINGS
    ]
    known: dict[str, Callable[[], nn.Module]] = {
        name: partial(_ours, name, width, head_dim)
        for name in (BASELINE, *(n for n in simple if n != BASELINE))
    }
    known |= {name: partial(make, width, head_dim) for name, make in PEERS.items()}
    known |= {f"projections of {name}": partial(_projections, name, width, head_dim) for name in COMPARED}
    for name in only or ():
        if name not in known:
            raise SystemExit(f"no mixer or peer {name!r}. Known: {', '.join(known)}.")
    return {name: make for name, make in known.items() if not only or name in (BASELINE, *only)}


def _ours(name: str, width: int, head_dim: int) -> TokenMixer:
    fields = mixer_entry(name).config.__dataclass_fields__
    heads = {"num_heads": width // head_dim} if "num_heads" in fields else {}
    torch.manual_seed(0)
    return build_mixer({"type": name, "d_model": width, **heads, **SETTINGS.get(name, {})})


def _projections(name: str, width: int, head_dim: int) -> Projections:
    return Projections(_ours(name, width, head_dim), width)


# Its backward pass takes time quadratic in T: 14 s for 512 tokens.
LONGEST = {("transformers Mamba", "forward+backward"): 256}


# ------------------------------------------------------------------------------------- parallel and decode


Keep = Callable[[str, Callable[[], Iterable[Row]]], list[Row]]


def _keeper(layers: Mapping[str, nn.Module], dtype: str, device: torch.device, options: Any) -> Keep:
    """`points.kept` for rows that depend on these layers, the options and the sources."""
    asked = {
        "dtype": dtype,
        "layers": list(layers),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "options": [options.max_seconds, options.max_gib, options.budget, options.max_length],
        "commit": options.commit or git_commit(),
        "torch": torch.__version__,
    }

    def keep(name: str, make: Callable[[], Iterable[Row]]) -> list[Row]:
        if options.quick:
            return list(make())
        found = points.kept(options.runs, f"{dtype}-{name}", asked, lambda: {"rows": list(make())})
        rows: list[Row] = found["rows"]
        return rows

    return keep


def _parallel(
    layers: Mapping[str, nn.Module],
    dtype: str,
    lengths: Sequence[int],
    device: torch.device,
    options: Any,
    keep: Keep,
) -> Iterator[Row]:
    """Forward, and forward with backward, at each length."""
    before: list[Row] = []
    for length in lengths:
        before = keep(str(length), partial(_at_length, layers, dtype, length, before, device, options))
        yield from before


def _at_length(
    layers: Mapping[str, nn.Module],
    dtype: str,
    length: int,
    before: Sequence[Row],
    device: torch.device,
    options: Any,
) -> list[Row]:
    """Rows of one length; `before` holds those of the length before."""
    width = layers[BASELINE].d_model
    x = torch.randn(1, length, width, device=device).to(getattr(torch, dtype))
    timed = {(row["mixer"], row["mode"]): row for row in before if "skipped" not in row}
    rows: list[Row] = []
    for mode in MODES:
        calls = {}
        for name, layer in layers.items():
            reason = _too_much(name, mode, length, timed.get((name, mode)), before, options)
            if reason is None:
                calls[name] = _call(layer, x, mode)
            else:
                rows.append(
                    {"mixer": name, "dtype": dtype, "tokens": length, "mode": mode, "skipped": reason}
                )
        times = common.time_interleaved(
            calls,
            device=device,
            budget_s=options.budget,
            warmup=1,
            min_repeats=2,
            max_repeats=12,
        )
        for name, taken in times.items():
            peak = common.peak_memory(calls[name], device)
            rows.append(
                {
                    "mixer": name,
                    "dtype": dtype,
                    "tokens": length,
                    "mode": mode,
                    **taken,
                    "tokens_per_second": 1e3 * length / taken["median_ms"],
                    "speed_over_attention": times[BASELINE]["median_ms"] / taken["median_ms"]
                    if BASELINE in times
                    else None,
                    "peak_mib": None if peak is None else peak / 2**20,
                }
            )
    return rows


def _too_much(
    name: str, mode: str, length: int, shorter: Row | None, before: Sequence[Row], options: Any
) -> str | None:
    """Why a call is left out, or None; full attention grows with the square of the length."""
    longest = LONGEST.get((name, mode))
    if longest is not None and length > longest:
        return f"time quadratic in the length, measured up to {longest} tokens only"
    if not before:
        return None
    last = before[0]["tokens"]
    if shorter is None:
        return f"left out at {last} tokens"
    growth = length / last
    expected = shorter["median_ms"] / 1e3 * growth ** (2 if name == BASELINE else 1)
    if expected > options.max_seconds:
        return f"about {expected:.0f} s expected, limit {options.max_seconds:g}"
    gib = (shorter["peak_mib"] or 0.0) / 2**10 * growth
    if gib > options.max_gib:
        return f"about {gib:.0f} GiB expected, limit {options.max_gib:g}"
    return None


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out.hidden if isinstance(layer, TokenMixer) else out


def _call(layer: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                _output(layer, x)

        return forward
    inputs = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def both() -> None:
        out = _output(layer, inputs[0])
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return both


@torch.no_grad()
def _decode(
    layers: Mapping[str, nn.Module], dtype: str, contexts: Sequence[int], device: torch.device, options: Any
) -> Iterator[Row]:
    """One token after each context; long ones only where the state does not grow."""
    functions: dict[str, Callable[[], object]] = {}
    described: dict[str, Row] = {}
    for name, layer in layers.items():
        if not isinstance(layer, TokenMixer):
            continue
        is_constant = layer.state_num_bytes(contexts[-1]) == layer.state_num_bytes(contexts[0])
        state, seen = None, 0
        for context in contexts if is_constant else contexts[:1]:
            while seen < context:
                x = torch.randn(1, min(PIECE, context - seen), layer.d_model, device=device)
                state = layer(x.to(getattr(torch, dtype)), state, return_state=True).state
                seen += x.shape[1]
            assert state is not None
            key = f"{name}\n{context}"
            token = torch.randn(1, layer.d_model, device=device).to(getattr(torch, dtype))
            functions[key] = partial(layer.step, token, state)
            described[key] = {
                "mixer": name,
                "dtype": dtype,
                "tokens": context,
                "mode": "decode",
                "state_bytes": state.num_bytes(),
                "is_constant": is_constant,
            }
    times = common.time_interleaved(
        functions, device=device, budget_s=min(options.budget, 0.5), max_repeats=200, wall_clock=True
    )
    for key, taken in times.items():
        yield {**described[key], **taken}


def _operations(
    dtype: str, lengths: Sequence[int], device: torch.device, options: Any
) -> Iterator[dict[str, Any]]:
    """Recurrences alone, at the lengths up to 8,192 tokens."""
    for tokens in lengths:
        if tokens > min(options.max_length, 8192):
            continue
        for row in mixer_operations.timed(dtype, tokens, device, options, scale=8 if options.quick else 1):
            taken = row.get("skipped") or f"{row['median_ms']:.4g} ms, ours x {row['speed_of_ours']:.3g}"
            print(f"{row['recurrence']} by {row['by']}, {tokens} tokens, {dtype}: {taken}", flush=True)
            yield row


# ------------------------------------------------------------------------------------------------ wanted


def checked(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """What the project wants of these figures, each with the value found."""
    ms = {(r["mixer"], r["dtype"], r["tokens"], r["mode"]): r["median_ms"] for r in rows}
    both = MODES[1]

    def check(what: str, value: float, bound: str, wanted: float) -> dict[str, Any]:
        reached = value >= wanted if bound == "at least" else value <= wanted
        return {"what": what, "value": value, "bound": bound, "wanted": wanted, "reached": reached}

    for name, (other, dtype, wanted) in WANTED_AT_2K.items():
        mine, theirs = ms.get((name, dtype, 2048, both)), ms.get((other, dtype, 2048, both))
        if mine and theirs:
            yield check(
                f"speed of {name} over {other}, {dtype}, 2,048 tokens", theirs / mine, "at least", wanted
            )
    for name, wanted in WANTED_TOKENS_PER_SECOND.items():
        if mine := ms.get((name, "float32", 2048, both)):
            yield check(f"tokens/s of {name}, float32, 2,048 tokens", 2048e3 / mine, "at least", wanted)
    constant = {row["mixer"] for row in rows if row.get("is_constant")}
    for name in dict.fromkeys(row["mixer"] for row in rows if row["mixer"] in constant):
        for dtype in DTYPES:
            mine, theirs = ms.get((name, dtype, 8192, both)), ms.get((BASELINE, dtype, 8192, both))
            if mine and theirs:
                yield check(
                    f"speed of {name} over {BASELINE}, {dtype}, 8,192 tokens", theirs / mine, "at least", 1.0
                )
            longer = ms.get((name, dtype, 32768, both))
            if mine and longer:
                yield check(
                    f"time of {name}, {dtype}, 32,768 over 8,192 tokens",
                    longer / mine,
                    "at most",
                    MOST_GROWTH,
                )
            short, long = (ms.get((name, dtype, context, "decode")) for context in CONTEXTS)
            if short and long:
                yield check(
                    f"time of a token of {name}, {dtype}, after 65,536 over 1,024",
                    long / short,
                    "at most",
                    MOST_DECODE_GROWTH,
                )


def _checked_operations(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["tokens"] == 2048 and row["by"] == "transformers" and "skipped" not in row:
            value = row["speed_of_ours"]
            yield {
                "what": f"speed of the recurrence of {row['recurrence']} over that of transformers, "
                f"{row['dtype']}, 2,048 tokens",
                "value": value,
                "bound": "at least",
                "wanted": WANTED_OF_OPERATIONS,
                "reached": value >= WANTED_OF_OPERATIONS,
            }


def _sentence(row: Row) -> str:
    setting = f"{row['mixer']}, {row['mode']}, {row['tokens']} tokens, {row['dtype']}"
    if "skipped" in row:
        return f"{setting}: skipped, {row['skipped']}"
    extra = "".join(
        f", {label} {row[key]:.3g}"
        for key, label in (
            ("speed_over_attention", "x attention"),
            ("peak_mib", "MiB"),
            ("state_bytes", "bytes"),
        )
        if row.get(key) is not None
    )
    return f"{setting}: {row['median_ms']:.4g} ms [{row['p10_ms']:.4g} .. {row['p90_ms']:.4g}]{extra}"


if __name__ == "__main__":
    sys.exit(main())
