"""The benchmark of the kernels runs and says what it measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels.py"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    return runpy.run_path(str(SCRIPT))["main"]


def test_quick_run_writes_a_record(main, tmp_path: Path) -> None:
    assert main(["--quick", "--records", str(tmp_path), "--budget", "0"]) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    results = record["results"]
    assert set(results) == {"attention", "linear", "decode"}
    names = {row["function"] for row in results["attention"]}
    assert names == {"window 64", "window 256", "window 1024", "sdpa, causal", "sdpa, mask of window 256"}
    for rows in results.values():
        for row in rows:
            assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["setting"]["dtype"] in ("float32", "bfloat16")
    ours = [row for row in results["linear"] if row["function"] == "linear_attention"]
    assert len(ours) == 4
    assert all(row["share_of_matmul_rate"] > 0 for row in ours)
    bounds = {"float32": 1e-5, "bfloat16": 5e-3}
    measured = [row for row in results["linear"] if "mode" in row["setting"]]
    assert all(0 < row["relative_error"] < bounds[row["setting"]["dtype"]] for row in measured)


def test_what_exceeds_a_limit_is_named(main, tmp_path: Path) -> None:
    assert main(["--quick", "--only", "attention", "--max-gib", "0.0001", "--records", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["results"]["attention"]
    skipped = [row for row in rows if "skipped" in row]
    assert {row["function"] for row in skipped} == {"sdpa, mask of window 256"}
    assert all("GiB expected, limit 0.0001" in row["skipped"] for row in skipped)
