"""Run the benchmarks one after another; each writes its own record.

    python benchmarks/run.py                  all, with their default settings (`make bench`)
    python benchmarks/run.py --only decode    one of them
    python benchmarks/run.py --quick          all in their small form, to try the scripts

Every script of this folder that can be started is a benchmark, except this one, `gpu_check.py`, which
`make gpu-check` runs, and `kvpress_peer.py`, which belongs in another environment. The exit code is 1 when
one of them failed; the others are run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOT_BENCHMARKS = ("gpu_check", "kvpress_peer", "run")


def benchmarks() -> dict[str, Path]:
    """Name -> script, sorted by name."""
    return {
        path.stem: path
        for path in sorted(FOLDER.glob("*.py"))
        if path.stem not in NOT_BENCHMARKS and "__main__" in path.read_text(encoding="utf-8")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 when all went well."""
    found = benchmarks()
    options = argparse.ArgumentParser(description="Run the benchmarks one after another.")
    options.add_argument("--only", action="append", choices=found, help="run this one (may be repeated)")
    options.add_argument("--quick", action="store_true", help="small sizes, to try the scripts")
    options.add_argument("--records", type=Path, help="folder of the records (default: as each script says)")
    asked = options.parse_args(arguments)

    chosen = asked.only or list(found)
    passed_on = ["--quick"] * asked.quick
    if asked.records is not None:
        passed_on += ["--records", str(asked.records)]
    failed = []
    for index, name in enumerate(chosen, start=1):
        print(f"[{index}/{len(chosen)}] {name} ...", flush=True)
        begin = time.perf_counter()
        code = subprocess.run([sys.executable, str(found[name]), *passed_on], check=False).returncode
        outcome = "done" if code == 0 else f"failed with exit code {code}"
        print(
            f"[{index}/{len(chosen)}] {name} {outcome} after {time.perf_counter() - begin:.0f} s", flush=True
        )
        if code:
            failed.append(name)
    if failed:
        print(f"{len(failed)} of {len(chosen)} benchmarks failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
