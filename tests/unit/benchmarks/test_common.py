"""What the benchmark scripts share."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def common():
    import common

    return common


def test_turns_are_timed_with_their_set_up_left_out(common) -> None:
    calls: list[str] = []

    def fast() -> None:
        calls.append("fast")

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.004)

    times = common.time_interleaved(
        {"fast": fast, "slow": slow},
        device=torch.device("cpu"),
        budget_s=0.0,
        min_repeats=4,
        warmup=1,
        before={"fast": lambda: time.sleep(0.02)},
    )
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 5, "one of warm-up and four that count"
    assert all(sorted(names) == ["fast", "slow"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 2, "not always in the same order"
    assert times["fast"]["repeats"] == 4
    assert times["fast"]["p10_ms"] <= times["fast"]["median_ms"] <= times["fast"]["p90_ms"]
    assert times["fast"]["median_ms"] < 4 <= times["slow"]["median_ms"]


def test_median_and_spread(common) -> None:
    assert common.summarize([float(i) for i in range(11)]) == {
        "median_ms": 5.0,
        "p10_ms": 1.0,
        "p90_ms": 9.0,
        "repeats": 11,
    }
    with pytest.raises(ValueError, match="no samples"):
        common.summarize([])


def test_peak_memory_sees_what_is_freed_again(common) -> None:
    device = torch.device("cpu")

    def use() -> None:
        torch.ones(16 << 20).add(1)  # two tensors of 64 MiB

    common.peak_memory(use, device)
    peak = common.peak_memory(use, device)
    if peak is None:
        pytest.skip("this system does not report the resident set")
    assert 120 << 20 < peak < 160 << 20


def test_a_quick_run_leaves_the_stored_records_alone(common, tmp_path: Path) -> None:
    quick = common.parser("test").parse_args(["--quick"])
    assert common.save(quick, "test", {}, {}) is None
    kept = common.parser("test").parse_args(["--quick", "--records", str(tmp_path), "--commit", "0123abc"])
    assert common.save(kept, "test", {}, {"x": 1}) == tmp_path / "test.json"
    full = common.parser("test").parse_args([])
    assert common.record_path(full, "test") == BENCHMARKS / "records" / "test.json"


def test_run_finds_the_scripts_and_reports_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import run

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    for name, code in (("bad", 3), ("good", 0), ("run", 1)):
        (tmp_path / f"{name}.py").write_text(
            f"import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit({code})\n"
        )
    (tmp_path / "shared.py").write_text("")
    assert list(run.benchmarks()) == ["bad", "good"]
    assert run.main(["--quick"]) == 1
    printed = capfd.readouterr()
    assert "[1/2] bad failed with exit code 3" in printed.out
    assert "[2/2] good done" in printed.out
    assert "['--quick']" in printed.out
    assert "1 of 2 benchmarks failed: bad" in printed.err
    assert run.main(["--only", "good", "--records", str(tmp_path)]) == 0
