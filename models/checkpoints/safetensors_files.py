"""Safetensors: one file or a sharded folder, read lazily and checked before anything is allocated.

Layout of a file: 8 bytes little-endian header length N, N bytes of JSON (name -> dtype, shape, data_offsets),
then the data. The header is checked against the size of the file first, so that a damaged one is a clear
error and never a huge allocation.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import StrPath, atomic_path, read_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation
MAX_RANK = 16

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: StrPath) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file, checked against its size.

    Raises:
        CheckpointError: the file is absent, truncated or damaged.
    """
    path = Path(path)
    try:
        file_size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_size > min(file_size - 8, MAX_HEADER_BYTES):
                raise _damaged(
                    path, f"its header of {header_size} bytes does not fit in a file of {file_size} bytes"
                )
            raw = file.read(header_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)

    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info, begin, end = _tensor_info(path, name, entry)
        infos[name] = info
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _damaged(path, f"the data of {name!r} begins at byte {begin}, expected {position}")
        position = end
    if 8 + header_size + position != file_size:
        raise _damaged(
            path, f"its header describes {8 + header_size + position} bytes, the file has {file_size}"
        )
    return infos


def read_safetensors(path: StrPath) -> dict[str, Tensor]:
    """All tensors of one file, memory-mapped; a write to a tensor stays in memory.

    Raises:
        CheckpointError: the file is absent, truncated or damaged.
    """
    return dict(iterate_safetensors(read_header(path)))


def list_weights(folder: StrPath) -> dict[str, TensorInfo]:
    """What a folder holds: its `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: no weights, a shard is absent or damaged, or index and shards disagree.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"{folder / INDEX_NAME} has no valid weight_map. The file is damaged; fetch it again."
            )
        infos: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_NAME} names {shard!r}, expected a .safetensors file of the same folder."
                )
            for name, info in read_header(folder / shard).items():
                if weight_map.get(name) != shard:
                    raise CheckpointError(
                        f"{folder / shard} holds {name!r}, but {INDEX_NAME} places it in "
                        f"{weight_map.get(name)!r}."
                    )
                infos[name] = info
        missing = sorted(set(weight_map) - set(infos))
        if missing:
            raise CheckpointError(
                f"{folder}: {INDEX_NAME} lists {missing[0]!r}, which is in no shard ({len(missing)} such)."
            )
        return infos
    if (folder / WEIGHTS_NAME).exists():
        return read_header(folder / WEIGHTS_NAME)
    pickled = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = (
        f" {pickled[0]} is a pickle file, which memzoo never reads: pickles can run code. Convert it to "
        f"safetensors first; the guide of models says how."
        if pickled
        else ""
    )
    raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}.{hint}")


def iterate_safetensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) file by file; shapes and dtypes are those of `infos`."""
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name, info in infos.items():
        by_file.setdefault(info.file, []).append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    tensor = file.get_tensor(name)
                    if tuple(tensor.shape) != infos[name].shape or tensor.dtype != infos[name].dtype:
                        raise _damaged(path, f"{name!r} changed while it was read")
                    yield name, tensor
        except CheckpointError:
            raise
        except Exception as error:  # the reader raises its own type, OSError or RuntimeError
            raise _damaged(path, str(error)) from error


def write_safetensors(path: StrPath, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file atomically. Tensors that share memory (tied weights) should be given once."""
    with atomic_path(path) as temporary:
        write_safetensors_in_place(temporary, tensors)


def write_safetensors_in_place(path: StrPath, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file straight to `path`; the caller renames it into place.

    One tensor at a time is copied to the CPU, and a full disk is the OSError that it is. (The writer of the
    format's own package makes a temporary file of its own, which a kill leaves behind.)

    Raises:
        CheckpointError: a tensor of a dtype or layout that the format does not have.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide items first keep every tensor aligned to its items
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    position = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is a tensor of dtype {tensor.dtype}, layout {tensor.layout} on {tensor.device}, "
                f"which safetensors cannot hold. Expected a dense one of {', '.join(_DTYPE_NAMES.values())}."
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            # resolved: a conjugate or negative view has to become plain numbers first
            plain = tensors[name].detach().resolve_neg().cpu().contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)


def plan_shards(tensors: Mapping[str, Tensor], max_shard_bytes: int = 5 * 10**9) -> dict[str, list[str]]:
    """File name -> names of the tensors in it: one file unless it would pass `max_shard_bytes`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if groups[-1] and size + num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _tensor_info(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header entry of {name!r} is not an object")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise _damaged(
            path, f"{name!r} has dtype {entry.get('dtype')!r}, expected one of {', '.join(_DTYPES)}"
        )
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or len(shape) > MAX_RANK:
        raise _damaged(path, f"{name!r} has shape {entry.get('shape')!r:.80}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r} has data_offsets {entry.get('data_offsets')!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise _damaged(
            path,
            f"{name!r} of shape {shape} needs {expected} bytes, its header gives {offsets[1] - offsets[0]}",
        )
    return TensorInfo(path, tuple(shape), dtype), offsets[0], offsets[1]


def _sizes(value: Any) -> list[int] | None:
    """`value` if it is a list of sizes, else None."""
    is_sizes = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
    return value if is_sizes else None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {reason}. Fetch or save it again.")
