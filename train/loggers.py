"""The logs of a run: `metrics.csv` and TensorBoard events in one folder, spared by a kill or a full disk."""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ..records import results_folder, write_text_atomically
from .checkpointing import STORAGE_ERRORS

logger = logging.getLogger(__name__)


class MetricsLogger(CSVLogger):
    """`metrics.csv` with a line for each logged step, on the disk as soon as it is logged.

    A folder ``version_N`` belongs to one run, also when two start at the same moment. Lines that cannot be
    written because the disk is full are kept and written later. A log that is there already is continued.

    Args:
        save_dir: folder of the runs.
        name: name of the run, a folder in it.
        version: number or name of the folder of this run; None takes the first number that is free.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str = "run", version: int | str | None = None
    ) -> None:
        super().__init__(save_dir, name, version)
        self._writer: _Writer | None = None

    def _get_next_version(self) -> int:
        """The first free number; making its folder is what takes it."""
        Path(self.root_dir).mkdir(parents=True, exist_ok=True)
        first = super()._get_next_version()
        for number in itertools.count(first):
            try:
                Path(self.root_dir, f"version_{number}").mkdir()
            except FileExistsError:
                continue
            break
        return number

    @property
    def experiment(self) -> Any:
        if self._writer is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._writer = self._experiment = _Writer(self.log_dir)
        return self._writer


class _Writer(ExperimentWriter):
    """Lightning's writer, except that it loses nothing when it is interrupted."""

    metrics: list[dict[str, Any]]
    metrics_keys: list[str]

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._has_warned = False

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines = [
            ",".join(fieldnames),
            *(",".join(row.get(name) or "" for name in fieldnames) for row in rows),
        ]
        write_text_atomically(path, "\r\n".join([*lines, ""]))

    def save(self) -> None:
        if not self.metrics:
            return
        path, keys = Path(self.metrics_file_path), list(self.metrics_keys)
        try:
            is_new = bool(self._record_new_keys())
            if not path.is_file():
                write_text_atomically(path, ",".join(self.metrics_keys) + "\r\n")
            elif is_new:
                self._rewrite_with_new_header(self.metrics_keys)
            keys = list(self.metrics_keys)
            self._append(path)
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            self.metrics_keys = keys
            if not self._has_warned:
                logger.warning("%s cannot be written (%s); its lines are kept.", path, error.strerror)
                self._has_warned = True
        else:
            self.metrics = []

    def _append(self, path: Path) -> None:
        size = path.stat().st_size
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, fieldnames=self.metrics_keys).writerows(self.metrics)
        except OSError:
            os.truncate(path, size)  # it may hold the beginning of a line
            raise


class EventsLogger(TensorBoardLogger):
    """TensorBoard events in the folder of a `MetricsLogger`.

    When they cannot be written, it warns and stops, and the run goes on.
    """

    def __init__(self, beside: MetricsLogger) -> None:
        super().__init__(beside.save_dir, beside.name, default_hp_metric=False)
        self._beside = beside
        self._has_failed = False

    def _get_next_version(self) -> Any:
        return self._beside.version

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._has_failed:
            return
        try:
            super().log_metrics(metrics, step)
        except (OSError, ValueError) as error:  # the parent wraps what its writer raises
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._has_failed = True
            logger.warning("the TensorBoard events of this run end here: %s.", cause.strerror or cause)


def default_loggers(save_dir: str | os.PathLike[str], name: str) -> list[Any]:
    """`metrics.csv` and TensorBoard events in ``save_dir/name/version_N``.

    Raises:
        ValueError: that cannot be written.
    """
    results_folder(Path(save_dir) / name)
    metrics = MetricsLogger(save_dir, name)
    return [metrics, EventsLogger(metrics)]
