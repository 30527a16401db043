"""Records of measurements."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo import records
from memzoo.records import (
    current_command,
    read_record,
    without_places,
    write_record,
    write_text_atomically,
)


def test_a_record_says_how_to_repeat_it(tmp_path: Path) -> None:
    results = {"loss": 1.5, "curve": torch.tensor([1.0, 2.0]), "bad": math.inf, "count": np.int64(3)}
    path = write_record(
        tmp_path / "deep" / "r.json", name="test", config={"window": 4}, results=results, command="memzoo x"
    )
    record = read_record(path)
    assert record["results"] == {"loss": 1.5, "curve": [1.0, 2.0], "bad": None, "count": 3}
    assert record["config"] == {"window": 4}
    assert record["command"] == "memzoo x"
    assert {"python", "memzoo", "torch", "numpy"} <= set(record["versions"])
    assert record["hardware"]["cores"] >= 1
    assert set(record) >= {"commit", "date", "name", "format_version"}
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_copy_without_git_can_name_its_commit(tmp_path: Path) -> None:
    path = write_record(tmp_path / "r.json", name="test", config={}, results={}, commit="0123abc")
    assert read_record(path)["commit"] == "0123abc"


@pytest.mark.parametrize(
    "changed, is_dirty", [("package/records.py", True), ("benchmarks/records/r.json", False)]
)
def test_sources_make_a_commit_dirty_and_records_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, is_dirty: bool
) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    for name in ("package/records.py", "benchmarks/records/r.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("one")
    git("init", "--quiet")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "package" / "records.py"))
    assert records.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / changed).write_text("two")
    assert records.git_commit() == git("rev-parse", "HEAD") + "-dirty" * is_dirty


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
        ('{"format_version": 1, "name": "x", "results": {}}', "not a record: it lacks"),
        ('{"format_version": "1", "name": "x", "config": {}, "results": {}}', "not a record: it lacks"),
        ('{"format_version": 1, "name": "x", "config": {}, "results": []}', "not a record: it lacks"),
        ('{"format_version": 99, "name": "", "config": {}, "results": {}}', "Update memzoo"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_record(path)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        write_record(tmp_path / "r.txt", name="x", config={}, results={})


def test_the_command_names_a_module_that_was_run_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/memzoo/cli.py", "convert", "--source", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("memzoo.cli", None), raising=False)
    assert current_command() == "python -m memzoo.cli convert --source 'a b'"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    assert current_command() == "cli.py convert --source 'a b'"


def test_a_command_can_be_shown_without_places() -> None:
    command = (
        "memzoo convert --source '/data/my models/llama' --output=/tmp/x/out --steps '{a: 1}' --recipe a/b"
    )
    shown = "memzoo convert --source llama --output=out --steps '{a: 1}' --recipe a/b"
    assert without_places(command) == shown
