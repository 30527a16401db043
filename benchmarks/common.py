"""What the benchmark scripts share: command line, timing, peak memory, records.

Every script has `main(arguments) -> exit code`, takes `--quick` (a small form that tests run), and writes one
JSON record with `save`, which says how to repeat it.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memzoo.records import write_record
from memzoo.train.host_memory import freed_memory_kept
from memzoo.train.speed import peak_memory as peak_memory

RECORDS = Path(__file__).resolve().parent / "records"


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark; a script adds its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="small sizes, to try the script itself")
    made.add_argument("--device", default="cpu", help="where to run, such as cuda (default: %(default)s)")
    made.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    made.add_argument(
        "--records", type=Path, help="folder of the record (default: benchmarks/records, with --quick none)"
    )
    made.add_argument("--commit", help="commit to name in the record, where the sources have no .git folder")
    return made


def prepare(options: argparse.Namespace) -> torch.device:
    """Set threads and exact float32 products; return the device of the run."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(options.device)


def record_path(options: argparse.Namespace, name: str) -> Path | None:
    """Where the record of benchmark `name` goes; None when it is not kept."""
    if options.records is not None:
        return Path(options.records, f"{name}.json")
    return None if options.quick else RECORDS / f"{name}.json"


def save(
    options: argparse.Namespace, name: str, config: Mapping[str, Any], results: Mapping[str, Any]
) -> Path | None:
    """Write the record of a benchmark, unless it is a quick run without a folder for it."""
    path = record_path(options, name)
    if path is None:
        return None
    return write_record(
        path, name=name, config=config, results=results, command=command_line(), commit=options.commit
    )


def command_line() -> str:
    """The command of this process as one types it in the root of the repository."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.resolve().parent.name}/{script.name}", *sys.argv[1:]])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(samples_ms: Sequence[float]) -> dict[str, float]:
    """Median, spread (10th and 90th percentile) and number of samples."""
    ordered = sorted(samples_ms)
    if not ordered:
        raise ValueError("no samples to summarize. Time at least one run.")
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[round(0.1 * last)],
        "p90_ms": ordered[round(0.9 * last)],
        "repeats": len(ordered),
    }


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    budget_s: float = 1.0,
    max_repeats: int = 30,
    min_repeats: int = 3,
    warmup: int = 2,
    before: Mapping[str, Callable[[], object]] | None = None,
    wall_clock: bool = False,
) -> dict[str, dict[str, float]]:
    """Time several functions in turns, so that drift of the machine meets all of them alike.

    Every round has its own order (seeded): a function that always followed the same one would always find the
    processor's caches in the state which that leaves. Freed memory is kept meanwhile, else the
    longest tensors would be timed together with the fresh pages they ask for.

    Args:
        functions: what to time, by name.
        device: on CUDA the time between two events around a run is taken, with the L2 cache emptied before;
            elsewhere the wall clock.
        budget_s: seconds per function; decides the repeats within their limits.
        warmup: untimed rounds in front; 0 for none.
        before: set-up by name, run untimed before each run.
        wall_clock: take the wall clock on CUDA too: the time a caller waits, launches included.

    Returns:
        name -> `summarize` of its times.
    """
    use_events = device.type == "cuda" and not wall_clock
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device=device) if use_events else None
    prepare_run = dict(before or {})

    def run(name: str) -> Callable[[], float]:
        if name in prepare_run:
            prepare_run[name]()
        if scratch is not None:
            scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            functions[name]()
            end.record()
            return lambda: float(start.elapsed_time(end))
        synchronize(device)
        begin = time.perf_counter()
        functions[name]()
        synchronize(device)
        taken = 1e3 * (time.perf_counter() - begin)
        return lambda: taken

    with freed_memory_kept():
        begin = time.perf_counter()
        for _ in range(warmup):
            for name in functions:
                run(name)
            synchronize(device)
            if time.perf_counter() - begin > 2 * budget_s * len(functions):
                break
        begin = time.perf_counter()
        taken: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
        order, shuffle = list(functions), random.Random(0).shuffle
        for count in range(1, max_repeats + 1):
            shuffle(order)
            for name in order:
                taken[name].append(run(name))
            synchronize(device)
            if count >= min_repeats and time.perf_counter() - begin > budget_s * len(functions):
                break
    return {name: summarize([read() for read in reads]) for name, reads in taken.items()}


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Plain text columns: the first to the left, the others to the right."""
    cells = [
        list(header),
        *([f"{item:.3g}" if isinstance(item, float) else str(item) for item in row] for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
