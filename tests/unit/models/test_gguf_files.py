"""The strict GGUF parser, against the gguf package's own reader and writer, and on damaged files."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from memzoo.models.checkpoints import gguf_files
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.gguf_files import GGUFFile, open_gguf

from .damage import damaged_copies


def write_small(path, quantization=gguf.GGMLQuantizationType.Q8_0) -> None:
    """A file with every kind of metadata and three tensors."""
    dice = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("general.name", "klein \u2603")
    writer.add_array("tokens", ["a", "bc", "", "\u00e9"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("scores", [0.5, -1.25])
    values = dice.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("q", gguf.quantize(values, quantization), raw_dtype=quantization)
    writer.add_tensor("f", dice.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("h", dice.standard_normal(7).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def summary(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in file.tensors.items()}


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_agrees_with_the_gguf_package(tmp_path, quantization):
    kind = gguf.GGMLQuantizationType[quantization]
    write_small(tmp_path / "m.gguf", kind)
    file, peer = open_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert file.architecture == "llama"
    for key in file.metadata:
        theirs = peer.get_field(key).contents()
        ours = file.metadata[key]
        assert ours == theirs or np.float32(ours) == np.float32(theirs)
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert summary(file) == {"q": (4, 64), "f": (3, 5), "h": (7,)}
    for tensor in peer.tensors:
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        actual = file.read(tensor.name)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected.float().reshape(actual.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_change_no_value_and_keep_little_in_memory(tmp_path, monkeypatch, dtype):
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(0).standard_normal((1000, 320), dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("x", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    whole = file.read("x", dtype)
    assert whole.dtype == dtype
    assert torch.equal(whole, file.read("x").to(dtype))
    monkeypatch.setattr(gguf_files, "BLOCK_VALUES", 7 * 320)
    tracemalloc.start()
    try:
        assert torch.equal(file.read("x", dtype), whole)
        _, peak = tracemalloc.get_traced_memory()  # numpy's arrays; the result is torch's
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes / 5


def test_500_damaged_files(tmp_path):
    """Each is a CheckpointError, or a load whose tensors have the shapes that the header states."""
    write_small(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    whole = open_gguf(tmp_path / "whole.gguf")
    header_bytes = min(info.offset for info in whole.tensors.values())
    outcomes = {"refused": 0, "loaded": 0}
    for index, broken in enumerate(damaged_copies(content, 500, seed=5, header_bytes=header_bytes)):
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(broken)
        try:
            file = open_gguf(path)
            tensors = {name: file.read(name) for name in file.tensors}
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == summary(file)
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            assert sum(tensor.numel() for tensor in tensors.values()) < 10_000
            outcomes["loaded"] += 1
        path.unlink()
    assert outcomes["refused"] > 250
    assert outcomes["loaded"] > 20


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "metadata"])
@pytest.mark.parametrize("claimed", [2**63, 2**32, 10**6])
def test_huge_counts_are_not_allocated(tmp_path, place, claimed):
    write_small(tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[place : place + 8] = struct.pack("<Q", claimed)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims"):
        open_gguf(tmp_path / "m.gguf")


def test_a_huge_list_is_not_allocated(tmp_path):
    for kind in (8, 5, 10):
        entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**60)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
        with pytest.raises(CheckpointError, match="claims"):
            open_gguf(tmp_path / "m.gguf")


def test_lists_of_lists_are_refused(tmp_path):
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(CheckpointError, match="unsupported type"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"PK\3\4" + bytes(60), "letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    ],
    ids=["empty", "zip", "version 1", "big-endian"],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_a_missing_file_and_missing_entries(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        open_gguf(tmp_path / "none.gguf")
    write_small(tmp_path / "m.gguf")
    file = open_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"llama\.context_length"):
        file.get("llama.context_length", int)
    with pytest.raises(CheckpointError, match="expected a value of type str"):
        file.get("llama.block_count", str)
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        file.read("x")


def test_overlapping_tensors_are_refused(tmp_path):
    write_small(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    file = open_gguf(tmp_path / "m.gguf")
    start = min(info.offset for info in file.tensors.values())
    offset = struct.pack("<Q", file.tensors["h"].offset - start)
    assert content.count(offset, 0, start) == 1
    (tmp_path / "m.gguf").write_bytes(content.replace(offset, struct.pack("<Q", 0), 1))
    with pytest.raises(CheckpointError, match="overlap"):
        open_gguf(tmp_path / "m.gguf")


def test_random_bytes_never_crash(tmp_path):
    dice = random.Random(7)
    for _ in range(200):
        tail = dice.randbytes(dice.randrange(0, 300))
        head = b"GGUF" + struct.pack("<IQQ", dice.choice((2, 3)), dice.randrange(4), dice.randrange(4))
        (tmp_path / "m.gguf").write_bytes(head + tail)
        try:
            open_gguf(tmp_path / "m.gguf")
        except CheckpointError:
            continue
        # only a file that claims nothing passes
        assert head[8:24] == bytes(16)
