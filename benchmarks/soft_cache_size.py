"""The soft cache size of retention gates beside one dense matrix per head: seconds and memory, with gradient.

    python benchmarks/soft_cache_size.py
    python benchmarks/soft_cache_size.py --tokens 2048

One call is a forward and a backward pass in float32 over one sequence. Every case runs in a process of its
own, whose largest resident set is the memory, less what it was before the call. A case that needs more than
the limit is stopped and said to.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from training_memory import OVER_LIMIT, largest_resident_set

from memzoo.kernels import soft_cache_size

LENGTHS = (2048, 8192, 32_768)


def dense(log_retention: Tensor) -> Tensor:
    """(1, T, A) by a matrix (T, T) of every head, as one writes it first."""
    place = torch.arange(log_retention.shape[1], dtype=log_retention.dtype)
    age = place[:, None] - place
    sizes = []
    for g in log_retention[0].unbind(1):
        kept = (age * g).masked_fill(age < 0, float("-inf")).exp()
        sizes.append(kept.sum(1))
    return torch.stack(sizes, 1)[None]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"soft_cache_size": soft_cache_size, "dense matrix": dense}


def run_case(form: str, tokens: int, heads: int, repeats: int, limit_gib: float) -> dict[str, Any]:
    """Seconds and bytes of a form in this process, which is not to be used further."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out after all, this process goes
    limit = int(limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    rates = 10 ** (-1 - 3 * torch.rand(1, tokens, heads))
    warm = (-rates[:, :64]).requires_grad_()
    FORMS[form](warm).sum().backward()
    before, seconds, sums = largest_resident_set(), [], []
    for _ in range(repeats):
        g = (-rates).requires_grad_()
        begin = time.perf_counter()
        sizes = FORMS[form](g)
        sizes.sum().backward()
        seconds.append(time.perf_counter() - begin)
        assert g.grad is not None
        sums = [float(sizes.double().sum()), float(g.grad.double().sum())]
        del sizes
    return {
        "seconds": statistics.median(seconds),
        "bytes": largest_resident_set() - before,
        "sum": sums[0],
        "gradient_sum": sums[1],
    }


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """The case in a fresh process; `fits` says whether it stayed below the limit."""
    text = json.dumps({**given, "threads": torch.get_num_threads()})
    done = subprocess.run(
        [sys.executable, __file__, "--case", text], capture_output=True, text=True, check=False
    )
    row = {name: given[name] for name in ("form", "tokens", "heads")}
    if done.returncode == OVER_LIMIT:
        return {**row, "fits": False}
    if done.returncode:
        raise SystemExit(f"{given['form']} at {given['tokens']} tokens failed:\n{done.stderr}")
    return {**row, "fits": True, **json.loads(done.stdout)}


def _child(text: str) -> int:
    given = json.loads(text)
    torch.set_num_threads(given.pop("threads"))
    try:
        result = run_case(**given)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return OVER_LIMIT
        raise
    print(json.dumps(result))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the record."""
    options_of = common.parser("Soft cache size against a dense matrix.")
    options_of.add_argument("--tokens", type=int, action="append", help="length (may be repeated)")
    options_of.add_argument("--heads", type=int, default=3, help="rates per token (default: %(default)s)")
    options_of.add_argument("--repeats", type=int, default=3, help="calls per case (default: %(default)s)")
    options_of.add_argument(
        "--limit_gib", type=float, default=18.0, help="of a process (default: %(default)s)"
    )
    options_of.add_argument("--case", help="for the processes that this script starts")
    options = options_of.parse_args(arguments)
    if options.case is not None:
        return _child(options.case)
    common.prepare(options)
    rows = []
    for tokens in options.tokens or ((256,) if options.quick else LENGTHS):
        for form in FORMS:
            given = {"heads": options.heads, "repeats": options.repeats, "limit_gib": options.limit_gib}
            rows.append(measure({"form": form, "tokens": tokens, **given}))
            row = rows[-1]
            shown = (
                f"{row['seconds']:.4f} s, {row['bytes'] / 2**20:.1f} MiB" if row["fits"] else "does not fit"
            )
            print(f"{form}, {tokens:,} tokens: {shown}", flush=True)
    config = {"limit_gib": options.limit_gib, "threads": torch.get_num_threads(), "repeats": options.repeats}
    common.save(options, "soft_cache_size", config, {"cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
