"""Checkpoints as folders: what goes in comes out, damage is refused, a failed save costs nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memzoo.models.checkpoints import files
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.folder import checked_place
from memzoo.train.checkpointing import (
    FolderCheckpointIO,
    load_checkpoint_folder,
    newest_checkpoint,
    save_checkpoint_folder,
)
from memzoo.train.command_line import find_checkpoint


def checkpoint(step: int = 3, size: int = 4) -> dict[str, Any]:
    return {"global_step": step, "epoch": 0, "state_dict": {"weight": torch.full((size,), float(step))}}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_everything_a_run_is_made_of_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    content = {
        "state_dict": {"a.b": torch.randn(3, 5, generator=generator), "half": torch.randn(3).bfloat16()},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(7)}, 1: {}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "foreach": None}],
            }
        ],
        "keys": {(1, "a"): 1, None: 2, True: 3, 2.5: 4, "$": 5, "1": 6, 7: 8},
        "floats": [0.1, 1e-320, -0.0, 1.7976931348623157e308],
        "big": 2**80,
        "path": Path("runs") / "a",
        "empty": [torch.zeros(0), torch.zeros(0, 3), {}, [], ()],
        "scalar": torch.tensor(True),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "__metadata__": torch.ones(1),
        "python": random.Random(1).getstate(),
        "numpy": np.random.RandomState(1).get_state(),
        "arrays": [np.arange(6, dtype="<u4").reshape(2, 3).T, np.float64(0.1), np.bool_(True), np.zeros(())],
        "torch": torch.get_rng_state(),
        "ümlaut": "ß",
    }
    save_checkpoint_folder(tmp_path / "c", content)
    loaded = load_checkpoint_folder(tmp_path / "c")
    assert same(content, loaded)
    random.Random().setstate(loaded["python"])
    np.random.RandomState().set_state(loaded["numpy"])
    ordered = OrderedDict(b=1, a=2)
    save_checkpoint_folder(tmp_path / "c", {"state_dict": ordered, "score": float("-inf")})
    loaded = load_checkpoint_folder(tmp_path / "c")
    assert list(loaded["state_dict"]) == ["b", "a"]
    assert loaded["score"] == float("-inf")
    save_checkpoint_folder(tmp_path / "c", {"loss": float("nan")})
    assert np.isnan(load_checkpoint_folder(tmp_path / "c")["loss"])


def test_tied_weights_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    weight, other = torch.randn(1000), torch.zeros(1000)
    save_checkpoint_folder(tmp_path / "c", {"in": weight, "out": [weight.view(1000)], "other": other})
    assert (tmp_path / "c" / "tensors.safetensors").stat().st_size < 2.2 * weight.nbytes
    loaded = load_checkpoint_folder(tmp_path / "c")
    assert loaded["in"] is loaded["out"][0]
    assert loaded["in"].data_ptr() != loaded["other"].data_ptr()
    assert torch.equal(loaded["in"], weight)
    save_checkpoint_folder(
        tmp_path / "c", {"whole": weight, "part": weight[:10], "row": weight.view(10, 100)}
    )
    loaded = load_checkpoint_folder(tmp_path / "c")
    assert torch.equal(loaded["part"], weight[:10])
    assert torch.equal(loaded["row"], weight.view(10, 100))


class Odd:
    """What nobody can store."""


@pytest.mark.parametrize(
    "value",
    [
        Odd(),
        {1, 2},
        b"x",
        torch.float32,
        np.array(["a"]),
        torch.zeros(2).to_sparse(),
        lambda: 0,
        torch.Size([1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_place_is_named_with_where_it_sits(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"at callbacks\.Mine\.0") as caught:
        save_checkpoint_folder(tmp_path / "c", {"callbacks": {"Mine": [value]}})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_tensor_of_a_foreign_dtype_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a' is a tensor of dtype torch\.complex64"):
        save_checkpoint_folder(tmp_path / "c", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "c").exists()


def test_damage_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "c"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint_folder(place)
    save_checkpoint_folder(place, checkpoint())
    generator = random.Random(0)
    for name in ("tensors.safetensors", "state.json"):
        whole = (place / name).read_bytes()
        for _ in range(20):
            raw = bytearray(whole)
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
            (place / name).write_bytes(raw)
            with pytest.raises(CheckpointError, match="SHA-256"):
                load_checkpoint_folder(place)
        (place / name).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match="SHA-256"):
            load_checkpoint_folder(place)
        (place / name).write_bytes(whole)
    manifest = (place / files.MANIFEST_NAME).read_bytes()
    for _ in range(60):
        raw = bytearray(manifest)
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        (place / files.MANIFEST_NAME).write_bytes(raw)
        try:
            assert same(load_checkpoint_folder(place), checkpoint())
        except CheckpointError:
            continue
    (place / files.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint of memzoo"):
        load_checkpoint_folder(place)
    (place / ".state.json.abc.tmp").touch()
    with pytest.raises(CheckpointError, match="never completed"):
        load_checkpoint_folder(place)
    files.write_folder(tmp_path / "m", {"x": lambda path: path.write_text("")}, extra={"kind": "memzoo"})
    with pytest.raises(CheckpointError, match="holds 'memzoo', not a checkpoint of training"):
        load_checkpoint_folder(tmp_path / "m")
    (tmp_path / "file.ckpt").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint_folder(tmp_path / "file.ckpt")


def test_the_newest_is_the_one_with_the_most_steps_that_is_whole(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    for name, step in (("a/one", 5), ("b/last.ckpt", 20), ("b/two", 10), ("c/c/three", 30)):
        save_checkpoint_folder(tmp_path / name, checkpoint(step))
    files.write_folder(
        tmp_path / "model",
        {"x": lambda path: path.write_text("")},
        extra={"kind": "memzoo", "global_step": 99},
    )
    assert newest_checkpoint(tmp_path) == tmp_path / "c/c/three"
    (tmp_path / "c/c/three/state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "b/last.ckpt"
    save_checkpoint_folder(tmp_path / "b/again", checkpoint(20))
    assert newest_checkpoint(tmp_path) == tmp_path / "b/again"
    assert newest_checkpoint(tmp_path / "b/two") == tmp_path / "b/two"
    with pytest.raises(CheckpointError, match="newest one nearby is"):
        load_checkpoint_folder(tmp_path / "b")


def test_other_readers_say_what_a_checkpoint_folder_is(tmp_path: Path) -> None:
    for name in ("last.ckpt", "other"):
        save_checkpoint_folder(tmp_path / name, checkpoint())
        with pytest.raises(CheckpointError, match="which only `memzoo train` reads"):
            checked_place(tmp_path / name)


def write_fails(monkeypatch: pytest.MonkeyPatch, number: int, function: str = "replace") -> None:
    def failing(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, function, failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_save_costs_nothing_but_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    function: str,
) -> None:
    io = FolderCheckpointIO()
    io.save_checkpoint(checkpoint(1), tmp_path / "one")
    io.save_checkpoint(checkpoint(1), tmp_path / "last")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        write_fails(patch, number, function)
        io.save_checkpoint(checkpoint(2), tmp_path / "two")
        io.remove_checkpoint(tmp_path / "one")
        io.save_checkpoint(checkpoint(2), tmp_path / "last")
    assert "CHECKPOINT NOT SAVED" in caplog.text
    assert f"The last complete one is {tmp_path / 'last'}." in caplog.text
    assert os.strerror(number) in str(io.failure)
    assert sorted(tmp_path.rglob("*")) == before, "no partial files, and the old checkpoint is kept"
    assert same(load_checkpoint_folder(tmp_path / "last"), checkpoint(1))
    assert newest_checkpoint(tmp_path) == tmp_path / "last"
    io.save_checkpoint(checkpoint(3), tmp_path / "three")
    assert io.failure is None
    assert not (tmp_path / "one").exists(), "deleted once something newer is there"
    assert newest_checkpoint(tmp_path) == tmp_path / "three"


def test_a_real_limit_of_the_system_is_met(tmp_path: Path) -> None:
    place = tmp_path / "last.ckpt"
    save_checkpoint_folder(place, checkpoint(1))
    child = os.fork()
    if child == 0:  # the limit cannot be taken back, so a child takes it; Python ignores SIGXFSZ by itself
        io = FolderCheckpointIO()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            io.save_checkpoint(checkpoint(2, size=1_000_000), place)
        finally:
            os._exit(0 if "too large" in str(io.failure) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same(load_checkpoint_folder(place), checkpoint(1))
    left = sorted(path.name for path in place.iterdir())
    assert left == [files.MANIFEST_NAME, "state.json", "tensors.safetensors"]


def test_other_errors_and_other_places_are_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = FolderCheckpointIO()
    with pytest.raises(ValueError, match="local"):
        io.save_checkpoint(checkpoint(), "s3://bucket/last.ckpt")
    with pytest.raises(ValueError, match="storage_options"):
        io.save_checkpoint(checkpoint(), tmp_path / "c", storage_options={})
    write_fails(monkeypatch, errno.ENOMEM)
    with pytest.raises(OSError, match="memory"):
        io.save_checkpoint(checkpoint(), tmp_path / "c")


def test_single_files_of_earlier_versions_are_read_without_pickled_code(tmp_path: Path) -> None:
    io = FolderCheckpointIO()
    torch.save(checkpoint(), tmp_path / "old.ckpt")
    assert same(io.load_checkpoint(tmp_path / "old.ckpt", weights_only=False), checkpoint())
    io.save_checkpoint(checkpoint(4), tmp_path / "old.ckpt")
    assert same(io.load_checkpoint(tmp_path / "old.ckpt"), checkpoint(4))
    assert same(io.load_checkpoint(tmp_path / "old-single-file.ckpt"), checkpoint())
    torch.save({"a": Odd()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="Odd"):
        io.load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"last.ckpt' (is no checkpoint, or a damaged one|holds a list)"
    ):
        FolderCheckpointIO().load_checkpoint(path)


def test_the_state_is_readable_as_json(tmp_path: Path) -> None:
    save_checkpoint_folder(tmp_path / "c", checkpoint(7))
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    assert state["checkpoint"]["global_step"] == 7
    assert state["checkpoint"]["state_dict"] == {"weight": {"$": "tensor", "name": "state_dict.weight"}}


def test_last_is_the_run_that_was_written_to_last(tmp_path: Path) -> None:
    assert find_checkpoint("fit", None, tmp_path) is None
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint("fit", "last", tmp_path)
    for name, step in (("version_0", 1000), ("version_1", 5), ("version_1", 7)):
        save_checkpoint_folder(tmp_path / name / "checkpoints" / f"step={step}.ckpt", checkpoint(step))
    assert find_checkpoint("fit", "last", tmp_path) == str(tmp_path / "version_1/checkpoints/step=7.ckpt")
    assert find_checkpoint("fit", str(tmp_path)) == str(tmp_path / "version_0/checkpoints/step=1000.ckpt")
    assert find_checkpoint("fit", "last") == "last", "left to Lightning"
