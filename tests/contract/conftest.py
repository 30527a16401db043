"""Writes the largest error of every mixer and check to the file that MEMZOO_CONTRACT_RECORD names."""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

_START = pytest.StashKey[float]()


def pytest_configure(config):
    config.stash[_START] = time.monotonic()


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    target = os.environ.get("MEMZOO_CONTRACT_RECORD")
    errors: dict[str, dict[str, float]] = {}
    failed = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_contract[" not in report.nodeid:
                continue
            if outcome == "failed":
                failed.append(report.nodeid.split("::")[-1])
            for name, value in report.user_properties:
                if name == "contract":
                    subject, check = _split_id(value[0])
                    errors.setdefault(subject, {})[check] = value[1]
    if not target or not errors:
        return
    record = {
        "command": "make contract",
        "splits": int(os.environ.get("MEMZOO_SPLITS", "25")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - config.stash[_START], 1),
        "failed": sorted(failed),
        "largest_error": {subject: dict(sorted(errors[subject].items())) for subject in sorted(errors)},
    }
    path = Path(target)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    terminalreporter.write_line(f"contract record: {path}")


def _split_id(name: str) -> tuple[str, str]:
    """'based-0-streaming-float64' -> ('based-0', 'streaming-float64')."""
    mixer, index, check = name.split("-", 2)
    return f"{mixer}-{index}", check
