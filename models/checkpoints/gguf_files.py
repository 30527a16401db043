"""GGUF files, read as data by a small strict parser.

Layout (versions 2 and 3, little-endian): magic `GGUF`, version u32, number of tensors u64, number of metadata
entries u64, the metadata (key, type, value), one record per tensor (name, rank, sizes innermost first, type,
offset), padding to `general.alignment`, the data.

Every count, length and offset is checked against the size of the file before anything is read or allocated,
so that a truncated or bit-flipped file is a `CheckpointError`. Only the blocks of a tensor whose place and
size are already checked go to `gguf.dequantize`.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError
from .files import StrPath

MAX_RANK = 4
MAX_NAME_BYTES = 65_535
DEFAULT_ALIGNMENT = 32
BLOCK_VALUES = 1 << 20  # dequantised at once

MetadataValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

# type number -> (struct letter, numpy dtype); 8 is a string, 9 an array
_SCALARS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<B", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY, _FLOAT32 = 7, 8, 9, 6


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in torch order (outermost first)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked GGUF file: its metadata, and its tensors on request."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]
    _bytes: np.ndarray = field(repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`.

        Raises:
            CheckpointError: the entry is missing.
        """
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A metadata entry of the given Python type (`int` is accepted for `float`).

        Raises:
            CheckpointError: the entry is missing without a default, or of another type.
        """
        if key not in self.metadata:
            if default is ...:
                raise CheckpointError(
                    f"{self.path} has no metadata entry {key!r}. "
                    "It is not a language model that memzoo reads."
                )
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r:.60}, expected a value of type {kind.__name__}."
            )
        return value

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantises one tensor, block of rows by block of rows, so that only the result is ever whole.

        Args:
            name: one of `tensors`.
            dtype: of the result; values are dequantised in float32 first.

        Raises:
            CheckpointError: no such tensor, or its type is not one of weights.
        """
        import gguf

        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        info = self.tensors[name]
        num_rows, width = math.prod(info.shape[:-1]), info.shape[-1]
        raw = self._bytes[info.offset : info.offset + info.num_bytes].reshape(num_rows, -1)
        out = torch.empty(num_rows, width, dtype=dtype)
        step = max(1, BLOCK_VALUES // width)
        for low in range(0, num_rows, step):
            rows = raw[low : low + step]
            if info.type_name == "F64":
                values = rows.view("<f8")
            else:
                try:
                    with np.errstate(all="ignore"):
                        values = gguf.dequantize(rows, gguf.GGMLQuantizationType[info.type_name])
                except NotImplementedError as error:
                    raise CheckpointError(
                        f"{self.path}: {name} has type {info.type_name}, which cannot be turned into weights."
                    ) from error
            out[low : low + step] = torch.from_numpy(np.array(values, dtype=np.float32))
        return out.view(info.shape)


def open_gguf(path: StrPath) -> GGUFFile:
    """Parses and checks the header of a GGUF file; tensors are mapped, not read.

    Raises:
        CheckpointError: the file is absent, truncated, damaged, of another version, or big-endian.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise CheckpointError(f"{path} is not a GGUF file: it has only {size} bytes.")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    return _Parser(path, mapped).parse()


class _Parser:
    """Walks the header once; `position` never passes the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def parse(self) -> GGUFFile:
        if self.take(4) != b"GGUF":
            folder = Path(self.path).parent
            is_model = (folder / "config.json").is_file()
            there = (
                f"Give its folder, {str(folder)!r}." if is_model else "Give a .gguf file or a model folder."
            )
            raise CheckpointError(
                f"{self.path} is not a GGUF file: it does not begin with the letters GGUF. {there}"
            )
        version = self.scalar(4)
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} has GGUF version {version}; versions 2 and 3 (little-endian) are read. "
                "Convert the file again with a current llama.cpp."
            )
        num_tensors, num_entries = self.scalar(10), self.scalar(10)
        # the shortest entry has 8 + 1 + 4 + 1 bytes, the shortest tensor record 8 + 1 + 4 + 8 + 4 + 8
        if num_entries * 14 + num_tensors * 33 > len(self.data):
            raise self.damaged(f"it claims {num_entries} metadata entries and {num_tensors} tensors")
        metadata = self.metadata(num_entries)
        records = [self.tensor_record() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self.position // alignment) * alignment
        return GGUFFile(
            self.path,
            metadata,
            self.place(records, start, alignment),
            np.frombuffer(self.data, dtype=np.uint8),
        )

    def metadata(self, num_entries: int) -> dict[str, MetadataValue]:
        entries: dict[str, MetadataValue] = {}
        for _ in range(num_entries):
            key = self.string(MAX_NAME_BYTES)
            if key in entries:
                raise self.damaged(f"the metadata entry {key!r} occurs twice")
            entries[key] = self.value(self.scalar(4), key)
        return entries

    def value(self, kind: int, key: str) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind != _ARRAY:
            raise self.damaged(f"the metadata entry {key!r} has the unknown type {kind}")
        item_kind, length = self.scalar(4), self.scalar(10)
        if item_kind == _STRING:
            if length * 8 > self.remaining:
                raise self.damaged(f"the list {key!r} claims {length} strings")
            return [self.string() for _ in range(length)]
        if item_kind not in _SCALARS:
            raise self.damaged(f"the list {key!r} has items of the unsupported type {item_kind}")
        dtype = np.dtype(_SCALARS[item_kind][1])
        if length * dtype.itemsize > self.remaining:
            raise self.damaged(f"the list {key!r} claims {length} numbers")
        items = np.frombuffer(self.take(length * dtype.itemsize), dtype=dtype)
        return items.astype(bool).tolist() if item_kind == _BOOL else items.tolist()

    def tensor_record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(MAX_NAME_BYTES)
        rank = self.scalar(4)
        if not 1 <= rank <= MAX_RANK:
            raise self.damaged(f"the tensor {name!r} has {rank} dimensions, expected 1 to {MAX_RANK}")
        sizes = tuple(self.scalar(10) for _ in range(rank))
        if min(sizes) < 1:
            raise self.damaged(f"the tensor {name!r} has the sizes {sizes}")
        return name, sizes[::-1], self.scalar(4), self.scalar(10)

    def place(
        self, records: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_number, offset in records:
            if name in tensors:
                raise self.damaged(f"the tensor {name!r} occurs twice")
            try:
                kind = GGMLQuantizationType(type_number)
                block_size, block_bytes = GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError) as error:
                raise self.damaged(f"the tensor {name!r} has the unknown type {type_number}") from error
            if shape[-1] % block_size:
                raise self.damaged(
                    f"rows of {name!r} have {shape[-1]} values, not a multiple of the {kind.name} block of "
                    f"{block_size}"
                )
            num_bytes = math.prod(shape) // block_size * block_bytes
            if offset % alignment or start + offset + num_bytes > len(self.data):
                raise self.damaged(
                    f"the tensor {name!r} of shape {shape} at offset {offset} does not fit in "
                    f"{len(self.data)} bytes"
                )
            tensors[name] = GGUFTensor(name, shape, kind.name, start + offset, num_bytes)
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for first, second in pairwise(in_order):
            if first.offset + first.num_bytes > second.offset:
                raise self.damaged(f"the tensors {first.name!r} and {second.name!r} overlap")
        return tensors

    def scalar(self, kind: int) -> Any:
        letter = _SCALARS[kind][0]
        (value,) = struct.unpack(letter, self.take(struct.calcsize(letter)))
        if kind == _BOOL:
            return bool(value)
        # the decimal that was meant: 1e-05, not 9.999999747378752e-06 (equal again once stored as float32)
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def string(self, max_bytes: int | None = None) -> str:
        length = self.scalar(10)
        if max_bytes is not None and not 1 <= length <= max_bytes:
            raise self.damaged(f"a name of {length} bytes")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string that is not UTF-8 at byte {self.position - length}") from error

    def take(self, count: int) -> bytes:
        if count > self.remaining:
            raise self.damaged(f"{count} bytes wanted at byte {self.position} of {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    @property
    def remaining(self) -> int:
        return len(self.data) - self.position

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a whole GGUF file: {reason}. Fetch it again.")
