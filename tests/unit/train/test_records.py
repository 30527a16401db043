"""Records and paired statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.train.records import read_record, write_record, write_text_atomically
from memzoo.train.statistics import paired_difference, student_t_quantile


def test_a_record_says_how_to_repeat_it(tmp_path: Path) -> None:
    results = {"loss": 1.5, "curve": torch.tensor([1.0, 2.0]), "bad": math.inf, "count": np.int64(3)}
    path = write_record(
        tmp_path / "deep" / "r.json", name="test", config={"window": 4}, results=results, command="memzoo x"
    )
    record = read_record(path)
    assert record["results"] == {"loss": 1.5, "curve": [1.0, 2.0], "bad": None, "count": 3}
    assert record["config"] == {"window": 4}
    assert record["command"] == "memzoo x"
    assert {"python", "torch", "numpy"} <= set(record["versions"])
    assert record["hardware"]["cores"] >= 1
    assert set(record) >= {"commit", "date", "name", "format_version"}
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a JSON record"),
        ("[]", "not a record"),
        ('{"format_version": 99, "name": "", "results": {}}', "Update memzoo"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_record(path)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        write_record(tmp_path / "r.txt", name="x", config={}, results={})


@pytest.mark.parametrize(
    "degrees, quantile",
    # Abramowitz and Stegun, table 26.10
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980)],
)
def test_student_t_quantiles_match_the_table(degrees: int, quantile: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-quantile, abs=5e-4)


def test_paired_difference_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    windows = rng.normal(3.0, 1.0, size=16)
    a, b = windows - 0.05 + rng.normal(0, 0.01, 16), windows
    difference = paired_difference(list(a), list(b))
    assert difference.t_low < difference.mean < difference.t_high < 0
    assert difference.excludes_zero()
    assert difference.mean == pytest.approx(float((a - b).mean()))
    assert -0.07 < difference.bootstrap_low < difference.mean < difference.bootstrap_high < -0.03
    half = student_t_quantile(0.975, 15) * float((a - b).std(ddof=1)) / 4
    assert difference.t_high - difference.mean == pytest.approx(half)
    assert paired_difference(list(a), list(b)) == difference, "the resampling is seeded"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        difference = paired_difference(list(rng.normal(size=8)), [0.0] * 8, num_resamples=2)
        covered += difference.t_low < 0 < difference.t_high
    assert 930 < covered < 970


def test_unpaired_or_broken_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 windows, b has 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference([1], [1])
    with pytest.raises(ValueError, match="no finite figure"):
        paired_difference([1, math.nan], [1, 2])
