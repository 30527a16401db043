"""The progress line: step, loss, tokens per second and the time that is left, also after a resume."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from memzoo.train import callbacks
from memzoo.train.callbacks import TrainingProgress

from .run_toys import Book, toy_run


class Line:
    """Stands for tqdm's line and keeps what it would show."""

    shown: list[tuple[dict[str, Any], str]]
    closed: list[tuple[str, int, int]]

    def __init__(self, real: Any) -> None:
        self.real, self.shown, self.closed = real, [], []

    def __call__(self, **settings: Any) -> Any:
        line = self.real(**settings | {"ncols": 200, "dynamic_ncols": False})
        refresh, close = line.refresh, line.close

        def record(*arguments: Any, **named: Any) -> Any:
            self.shown.append((dict(line.format_dict), str(line)))
            return refresh(*arguments, **named)

        def end() -> None:
            self.closed.append((line.desc, line.n, line.total))
            close()

        line.refresh, line.close = record, end
        return line


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    made = Line(callbacks.tqdm)
    monkeypatch.setattr(callbacks, "tqdm", made)
    return made


def settings(progress: TrainingProgress) -> dict[str, Any]:
    return {"enable_progress_bar": True, "limit_val_batches": 0, "max_epochs": 2}


def test_the_time_left_counts_from_where_the_run_began(tmp_path: Path, line: Line) -> None:
    progress = TrainingProgress(refresh_rate=1)
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    toy_run(progress, keeper, book=Book(), **settings(progress))
    (middle,) = tmp_path.glob("*step=4.ckpt")
    for begin, path in ((0, None), (4, middle)):
        line.shown.clear()
        progress = TrainingProgress(refresh_rate=1)
        toy_run(progress, book=Book(), path=path, **settings(progress))
        steps = [(facts, text) for facts, text in line.shown if facts["n"] > begin]
        assert steps[0][0]["n"] == begin + 1
        assert steps[-1][0]["n"] == 8
        for facts, text in steps:
            assert (facts["initial"], facts["total"]) == (begin, 8)
            assert f"{facts['n']}/8" in text
            assert "tok/s=" in text
            assert "peak=" in text
            assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, ", text), text
        # what is left takes as long per step as what was made since the start, not since step 0
        facts, text = dict(steps[0][0]), ""
        text = line.real.format_meter(**facts | {"elapsed": 10.0, "rate": None, "ncols": 200})
        assert f"<{(7 - begin) * 10 // 60:02d}:{(7 - begin) * 10 % 60:02d}" in text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, list(range(1, 9))), (1e9, [5, 8])], ids=["slow", "fast"]
)
def test_slow_steps_are_shown_one_by_one(
    tmp_path: Path, line: Line, seconds: float, shown: list[int]
) -> None:
    progress = TrainingProgress(refresh_rate=5, refresh_seconds=seconds)
    toy_run(progress, book=Book(), **settings(progress))
    assert sorted({facts["n"] for facts, _ in line.shown} - {0}) == shown


def test_validations_have_a_line_of_their_own(tmp_path: Path, line: Line) -> None:
    progress = TrainingProgress()
    toy_run(progress, book=Book(), **settings(progress) | {"limit_val_batches": 3})
    assert set(line.closed) == {("validation", 3, 3), ("train", 8, 8)}
