"""Writes the largest error of every mixer and check to the file that MEMZOO_CONTRACT_RECORD names."""

import os
import time

import pytest

from memzoo.records import write_record

_START = pytest.StashKey[float]()


def pytest_configure(config):
    config.stash[_START] = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    target = os.environ.get("MEMZOO_CONTRACT_RECORD")
    errors: dict[str, dict[str, float]] = {}
    failed = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_contract[" not in report.nodeid:
                continue
            if outcome == "failed":
                failed.append(report.nodeid.split("::")[-1])
            for subject, check, error in (
                value for key, value in report.user_properties if key == "contract"
            ):
                errors.setdefault(subject, {})[check] = error
    if not target or not errors:
        return
    largest: dict[str, float] = {}
    for found in errors.values():
        for check, error in found.items():
            largest[check] = max(error, largest.get(check, 0.0))
    path = write_record(
        target,
        name="contract",
        command="make contract",
        config={
            "splits": int(os.environ.get("MEMZOO_SPLITS", "25")),
            "processes": config.option.numprocesses,
        },
        results={
            "seconds": round(time.monotonic() - config.stash[_START], 1),
            "failed": sorted(failed),
            "largest_error_by_check": dict(sorted(largest.items())),
            "error_by_mixer": {subject: dict(sorted(errors[subject].items())) for subject in sorted(errors)},
        },
    )
    terminalreporter.write_line(f"record of the contract: {path}")
