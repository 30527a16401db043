"""Files written atomically, folders sealed by a manifest, and safetensors files that survive damage."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.files import (
    MANIFEST_NAME,
    atomic_path,
    read_json,
    seal_folder,
    verify_folder,
    write_folder,
    write_json,
)
from memzoo.models.checkpoints.safetensors_files import (
    INDEX_NAME,
    iterate_safetensors,
    list_weights,
    plan_shards,
    read_header,
    read_safetensors,
    write_safetensors,
)

from .damage import damaged_copies


def small_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(4, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def write_text(text: str):
    return lambda path: path.write_text(text)


def test_atomic_path_leaves_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert read_json(target) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b'{"a": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "cut", "not utf-8", "deep", "long number"],
)
def test_bad_json_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_folder_round_trip_and_stale_files_go(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, {"one": write_text("1"), "two": write_text("2")})
    (folder / "readme.txt").write_text("mine")
    assert set(verify_folder(folder)["files"]) == {"one", "two"}
    write_folder(folder, {"one": write_text("1b")})
    assert sorted(os.listdir(folder)) == sorted(["one", "readme.txt", MANIFEST_NAME])
    verify_folder(folder, required=True)


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_changed_content_is_refused(tmp_path, change):
    write_folder(tmp_path, {"weights": write_text("0123456789")})
    path = tmp_path / "weights"
    if change == "flip":
        path.write_text("0123456780")
    elif change == "cut":
        path.write_text("01234")
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="weights"):
        verify_folder(tmp_path)


def test_a_folder_without_manifest_is_refused_only_where_one_is_required(tmp_path):
    assert verify_folder(tmp_path) is None
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        verify_folder(tmp_path, required=True)
    (tmp_path / "a").write_text("a")
    seal_folder(tmp_path, ["a"])
    verify_folder(tmp_path, required=True)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "."])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    entry = {"sha256": "0" * 64, "num_bytes": 1}
    write_json(tmp_path / MANIFEST_NAME, {"format_version": 1, "files": {name: entry}})
    with pytest.raises(CheckpointError, match="plain file name"):
        verify_folder(tmp_path)


def test_damaged_manifests_never_crash(tmp_path):
    write_folder(tmp_path, {"weights": write_text("0123456789")})
    path = tmp_path / MANIFEST_NAME
    whole = path.read_bytes()
    refused = 0
    for broken in damaged_copies(whole, 500, seed=1):
        path.write_bytes(broken)
        try:
            manifest = verify_folder(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            assert manifest["files"].keys() <= {"weights"}
        assert (tmp_path / "weights").read_text() == "0123456789"
    assert refused > 450
    write_folder(tmp_path, {"weights": write_text("new")})  # a damaged folder can be saved over
    verify_folder(tmp_path)


def test_a_kill_during_saves_leaves_a_readable_folder(tmp_path):
    """50 saves in a row in another process, killed at a random moment, again and again."""
    folder = tmp_path / "last"
    script = textwrap.dedent(
        """
        import sys
        from memzoo.models.checkpoints.files import write_folder
        for step in range(50):
            text = str(step) * 20000
            write = lambda path, text=text: path.write_text(text)
            write_folder(sys.argv[1], {"a": write, "b": write})
            sys.stdout.write("saved")
            sys.stdout.flush()
        """
    )
    dice = random.Random(3)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        child.stdout.read(5 * dice.randrange(1, 20))
        child.send_signal(signal.SIGKILL)
        child.wait()
        verify_folder(folder, required=True)
        assert (folder / "a").read_text() == (folder / "b").read_text()


def test_a_save_cut_after_its_commit_is_completed_by_the_reader(tmp_path, monkeypatch):
    from memzoo.models.checkpoints import files

    write_folder(tmp_path, {"a": write_text("old"), "b": write_text("old")})
    finish = files._finish_commit
    calls = []

    def killed(folder: Path) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "_finish_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {"a": write_text("new"), "b": write_text("new")})
    monkeypatch.setattr(files, "_finish_commit", finish)
    assert (tmp_path / "a").read_text() == "old"
    verify_folder(tmp_path)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"


def test_safetensors_round_trip_is_bit_equal(tmp_path):
    weights = small_weights()
    write_safetensors(tmp_path / "w.safetensors", weights)
    loaded = read_safetensors(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_500_damaged_safetensors_files(tmp_path):
    """Each is a CheckpointError, or a load with the shapes and dtypes that its header states."""
    path = tmp_path / "w.safetensors"
    weights = small_weights()
    write_safetensors(path, weights)
    content = path.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    outcomes = {"refused": 0, "loaded": 0}
    for index, broken in enumerate(damaged_copies(content, 500, seed=2, header_bytes=header_bytes)):
        path = tmp_path / f"{index}.safetensors"  # a new file each time: loaded tensors map the old one
        path.write_bytes(broken)
        try:
            loaded = read_safetensors(path)
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            expected = {(info.shape, info.dtype) for info in read_header(path).values()}
            assert {(tuple(tensor.shape), tensor.dtype) for tensor in loaded.values()} == expected
            assert sum(tensor.numel() for tensor in loaded.values()) == 20
            outcomes["loaded"] += 1
        path.unlink()
    assert outcomes["refused"] > 250
    assert outcomes["loaded"] > 20  # flips inside the data cannot be seen without a manifest


@pytest.mark.parametrize("claimed", [2**63, 2**40, 10**9])
def test_a_huge_header_is_not_allocated(tmp_path, claimed):
    (tmp_path / "w.safetensors").write_bytes(claimed.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safetensors(tmp_path / "w.safetensors")


def test_a_tensor_claiming_more_than_the_file_is_not_allocated(tmp_path):
    entry = {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(entry).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="describes"):
        read_safetensors(tmp_path / "w.safetensors")


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    shards = plan_shards(weights, max_shard_bytes=64)
    assert len(shards) > 1
    for name, group in shards.items():
        write_safetensors(folder / name, {key: weights[key] for key in group})
    weight_map = {key: name for name, group in shards.items() for key in group}
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def test_sharded_folder(tmp_path):
    weights = small_weights()
    write_shards(tmp_path, weights)
    loaded = dict(iterate_safetensors(list_weights(tmp_path)))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("fault", ["shard gone", "name gone", "outside"])
def test_faulty_index(tmp_path, fault):
    write_shards(tmp_path, small_weights())
    index = read_json(tmp_path / INDEX_NAME)
    if fault == "shard gone":
        (tmp_path / index["weight_map"]["a.weight"]).unlink()
    elif fault == "name gone":
        index["weight_map"]["ghost"] = index["weight_map"]["a.weight"]
    else:
        index["weight_map"]["a.weight"] = "../other.safetensors"
    write_json(tmp_path / INDEX_NAME, index)
    with pytest.raises(CheckpointError):
        list_weights(tmp_path)


def test_a_folder_without_weights_says_so_and_never_reads_pickle(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        list_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        list_weights(tmp_path)
