"""Killed runs, in small: the benchmark does the same fifty times over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
@pytest.mark.parametrize(
    ("name", "num_tensors", "num_logged"),
    [
        ("train text", 12, 50),
        ("train with carried memory", 19, 50),
        ("convert: all stages, control and ablation", 90, 0),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, name: str, num_tensors: int, num_logged: int
) -> None:
    import kills

    found = kills.kill_case(kills.CASES[name], tmp_path, kills=3)
    assert found["different"] == []
    assert found["kills"] == 3
    assert found["tensors_compared"] > num_tensors
    assert found["logged_numbers_compared"] >= num_logged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_saves_that_are_killed_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    import kills

    found = kills.kill_saves(tmp_path, kills=8)
    assert found["unreadable"] == []
    assert found["inconsistent"] == 0
    assert found["versions_written"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_the_comparison_sees_what_is_lost(tmp_path: Path) -> None:
    import kills

    def forgetful(folder: Path) -> dict[str, object]:
        time.sleep(0.1)
        return {"moment": time.time(), "weights": torch.zeros(2)}

    assert kills.kill_case(forgetful, tmp_path, kills=1)["different"] == ["moment"]
    assert kills.differences({"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}) == ["a"]
    assert kills.differences({"a": 1}, {"a": 1, "b": 2}) == ["b"]


def test_two_values_for_one_logged_number_are_refused(tmp_path: Path) -> None:
    import kills

    for name, value in (("version_0", "0.5"), ("version_1", "0.5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,loss\n1,{value}\n2,\n")
    assert kills.logged_numbers(tmp_path) == {
        "loss at step 1": "0.5",
        "step at step 1": "1",
        "step at step 2": "2",
    }
    (tmp_path / "version_1" / "metrics.csv").write_text("step,loss\n1,0.25\n")
    with pytest.raises(RuntimeError, match=r"loss at step 1 is 0\.5 in one part of the run and 0\.25"):
        kills.logged_numbers(tmp_path)
