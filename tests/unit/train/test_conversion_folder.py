"""The folder of a conversion: whose it is, and what may go on there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memzoo.train.conversion.folder import MANIFEST, begin, claimed, finish, is_begun, note_run, start_anew

SETTINGS = {"recipe": {"seed": 1, "layers": (0, 1)}, "source": "abc", "threads": 2}


def started(folder: Path) -> Path:
    begin(folder, SETTINGS)
    (folder / "work" / "stages").mkdir(parents=True)
    return folder


def test_two_processes_do_not_convert_into_one_folder(tmp_path: Path) -> None:
    with claimed(tmp_path):
        begin(tmp_path, SETTINGS)
        with pytest.raises(ValueError, match="another process is converting into"), claimed(tmp_path):
            pass
    assert not (tmp_path / "work").exists()
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    assert not (tmp_path / "work").exists()
    with claimed(tmp_path):
        started(tmp_path)
    (tmp_path / f".{MANIFEST}.x1.tmp").write_text("{")  # of a kill in the middle of writing
    with claimed(tmp_path):  # the one that ended has given it free
        assert is_begun(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "work"]


@pytest.mark.parametrize("name", ["thesis.tex", "stages.bak"])
def test_files_of_others_are_never_removed(tmp_path: Path, name: str) -> None:
    own = tmp_path / "work" / name
    own.parent.mkdir()
    own.write_text("mine")
    for act in (start_anew, finish, is_begun, lambda folder: begin(folder, SETTINGS)):
        (tmp_path / MANIFEST).write_text('{"format_version": 1}')
        with pytest.raises(ValueError, match=f"is not of a conversion: it holds '{name}'"):
            act(tmp_path)
    with pytest.raises(ValueError, match="Name another output folder"), claimed(tmp_path):
        pass
    assert own.read_text() == "mine"


def test_only_the_same_conversion_goes_on(tmp_path: Path) -> None:
    begin(started(tmp_path), SETTINGS)
    for changed, message in (
        ({"threads": 8}, "other threads: 2 there, 8 here. OMP_NUM_THREADS=2 goes on"),
        ({"recipe": {"seed": 2, "layers": [0, 1]}}, r"other recipe: seed\)"),
        ({"source": "abd"}, r"other source\). Name another folder, or add --overwrite"),
        ({"text": "x"}, "other text"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(tmp_path, {**SETTINGS, **changed})
    start_anew(tmp_path)
    begin(tmp_path, {**SETTINGS, "threads": 8})


@pytest.mark.parametrize("content", [None, "", "[]", '{"format_version": 99}'])
def test_work_without_its_manifest_is_not_gone_on_with(tmp_path: Path, content: str | None) -> None:
    started(tmp_path)
    (tmp_path / MANIFEST).unlink()
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="Add --overwrite to start anew"):
        begin(tmp_path, SETTINGS)


def test_a_finished_conversion_is_not_taken_for_a_begun_one(tmp_path: Path) -> None:
    started(tmp_path)
    note_run(tmp_path, "hybrid", {"num_trained": 3})
    finish(tmp_path)
    assert not (tmp_path / "work").exists()
    assert json.loads((tmp_path / MANIFEST).read_text())["runs"] == {"hybrid": {"num_trained": 3}}
    (tmp_path / "work" / "rows").mkdir(parents=True)  # of a removal that was killed
    assert not is_begun(tmp_path)
    begin(tmp_path, {**SETTINGS, "source": "abd"})
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["work", MANIFEST, "report.json", "index.html"])
def test_what_stands_in_the_way_is_found_before_the_work(tmp_path: Path, name: str) -> None:
    if name == "work":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}' is a .*Name another output folder"), claimed(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
