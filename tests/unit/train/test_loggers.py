"""Logs that nothing empties: header rewrites, full disks, two runs that start at once."""

from __future__ import annotations

import csv
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from memzoo.train import loggers
from memzoo.train.loggers import EventsLogger, MetricsLogger, default_loggers


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def log(logger: MetricsLogger, step: int, **metrics: float) -> None:
    logger.log_metrics(metrics, step)
    logger.save()


def test_new_columns_and_a_second_part_keep_the_old_lines(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, "a", version=0)
    log(logger, 1, loss=0.1)
    log(logger, 2, loss=0.2, val_loss=0.3)
    again = MetricsLogger(tmp_path, "a", version=0)
    log(again, 3, accuracy=1.0)
    assert rows(tmp_path / "a" / "version_0") == [
        {"step": "1", "loss": "0.1"},
        {"step": "2", "loss": "0.2", "val_loss": "0.3"},
        {"step": "3", "accuracy": "1.0"},
    ]


def test_a_kill_while_columns_are_added_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = MetricsLogger(tmp_path, "a", version=0)
    log(logger, 1, loss=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: os._exit(0))
        child = os.fork()
        if child == 0:
            try:
                log(logger, 2, val_loss=0.3)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert rows(tmp_path / "a" / "version_0") == [{"step": "1", "loss": "0.1"}]


def test_lines_are_kept_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MetricsLogger(tmp_path, "a", version=0)
    log(logger, 1, loss=0.1)

    class Torn(csv.DictWriter):  # type: ignore[type-arg]
        def writerows(self, lines: Any) -> None:
            super().writerows(lines[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(loggers.csv, "DictWriter", Torn)
        log(logger, 2, loss=0.2)
        log(logger, 3, loss=0.3, other=1.0)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert rows(tmp_path / "a" / "version_0") == [{"step": "1", "loss": "0.1"}]
    log(logger, 4, loss=0.4)
    assert [line["step"] for line in rows(tmp_path / "a" / "version_0")] == ["1", "2", "3", "4"]


def test_two_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    first, second = MetricsLogger(tmp_path, "a"), MetricsLogger(tmp_path, "a")
    assert {first.version, second.version} == {0, 1}
    (tmp_path / "a" / "version_7").mkdir()
    assert MetricsLogger(tmp_path, "a").version == 8


def test_events_lie_beside_the_metrics_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, events = default_loggers(tmp_path, "a")
    assert isinstance(events, EventsLogger)
    assert metrics.log_dir == events.log_dir == str(tmp_path / "a" / "version_0")
    events.log_metrics({"loss": 0.5}, 1)
    events.experiment.flush()
    assert list((tmp_path / "a" / "version_0").glob("events.out.tfevents.*"))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(events.experiment, "add_scalar", full)
        events.log_metrics({"loss": 0.5}, 2)
        events.log_metrics({"loss": 0.5}, 3)
    assert caplog.text.count("events of this run end here: No space left on device") == 1
    events._has_failed = False
    with pytest.raises(ValueError, match="not supported"):
        events.log_metrics({"loss": object()}, 4)
