"""Nested Python data as JSON beside named tensors: what a training checkpoint is made of.

Tensors leave the tree and are replaced by their names; whatever JSON cannot say itself becomes an object with
the one key ``$`` and what it is::

    {"$": "tensor", "name": "state_dict.weight"}        {"$": "tuple", "items": [1, 2]}
    {"$": "dict", "items": [[0, "a"], [1, "b"]]}        {"$": "path", "value": "runs/a"}

Nothing in such a file can name code: decoding knows the kinds below and no others.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.checkpoints.errors import CheckpointError

_KIND = "$"
_NUMBERS = "biufc"  # kinds of numpy numbers: truth values, integers, floats, complex


class Encoder:
    """Splits a tree into plain JSON data and tensors.

    A tensor that occurs twice, as tied weights do (same memory, shape and strides), is stored once and comes
    back as one tensor. Tensors that overlap in another way are stored one by one.

    Attributes:
        tensors: name -> tensor, filled by `encode`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, where: str = "") -> Any:
        """JSON data for a tree of None, numbers, text, lists, tuples, dicts, paths, numpy and dense tensors.

        Args:
            value: the tree.
            where: its place, for names and errors.

        Raises:
            ValueError: anything else, with its place.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_KIND: "float", "value": str(value)}
        if isinstance(value, Tensor):
            return {_KIND: "tensor", "name": self._store(value, where)}
        if isinstance(value, dict):
            return self._encode_dict(value, where)
        if type(value) is list:
            return self._encode_items(value, where)
        if type(value) is tuple:
            return {_KIND: "tuple", "items": self._encode_items(value, where)}
        if isinstance(value, Path):
            return {_KIND: "path", "value": str(value)}
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _NUMBERS:
            return self._encode_numbers(value, where)
        raise ValueError(
            f"the checkpoint holds a {type(value).__module__}.{type(value).__qualname__} at "
            f"{where or 'its top'}, which has no place in a checkpoint without pickle. Save None, numbers, "
            "text, lists, tuples, dicts, paths, numpy arrays or dense tensors there."
        )

    def _encode_items(self, items: list[Any] | tuple[Any, ...], where: str) -> list[Any]:
        return [self.encode(item, f"{where}.{position}") for position, item in enumerate(items)]

    def _encode_dict(self, content: dict[Any, Any], where: str) -> Any:
        def inner(key: Any) -> str:
            return f"{where}.{key}" if where else str(key)

        if all(type(key) is str for key in content) and _KIND not in content:
            return {key: self.encode(item, inner(key)) for key, item in content.items()}
        items = [
            [self.encode(key, f"a key of {where or 'the top'}"), self.encode(item, inner(key))]
            for key, item in content.items()
        ]
        return {_KIND: "dict", "items": items}

    def _encode_numbers(self, value: np.ndarray[Any, Any] | np.generic, where: str) -> dict[str, Any]:
        shown = value.dtype.newbyteorder("<").str
        raw = np.ascontiguousarray(value, dtype=shown).reshape(-1).view(np.uint8)
        if isinstance(value, np.generic):
            return {_KIND: "scalar", "dtype": shown, "value": base64.b64encode(raw.tobytes()).decode()}
        name = self._store(torch.from_numpy(raw.copy()), where)
        return {_KIND: "array", "dtype": shown, "shape": list(value.shape), "name": name}

    def _store(self, tensor: Tensor, where: str) -> str:
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"the checkpoint holds a tensor of layout {tensor.layout} on {tensor.device} at {where}. "
                "Save dense tensors that hold numbers."
            )
        # an address alone is not enough: empty tensors have none
        same = (
            tensor.untyped_storage().data_ptr() or id(tensor),
            tensor.storage_offset(),
            tensor.dtype,
            tensor.device,
            tuple(tensor.shape),
            tensor.stride(),
        )
        if same not in self._names:
            name = where or "tensor"
            while name in self.tensors or name == "__metadata__":
                name += "'"
            self.tensors[name] = tensor.detach()  # holds the memory, so that no other tensor gets its address
            self._names[same] = name
        return self._names[same]


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `Encoder.encode` was given.

    Args:
        value: JSON data.
        tensors: name -> tensor.

    Raises:
        CheckpointError: a kind this version does not know, or a tensor that is not there.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {key: decode(item, tensors) for key, item in value.items()}
    try:
        match value[_KIND]:
            case "tensor":
                return tensors[value["name"]]
            case "tuple":
                return tuple(decode(item, tensors) for item in value["items"])
            case "dict":
                return {decode(key, tensors): decode(item, tensors) for key, item in value["items"]}
            case "path":
                return Path(value["value"])
            case "float":
                return float(value["value"])
            case "array":
                raw = tensors[value["name"]].cpu().numpy()
                return raw.view(_number_type(value["dtype"])).reshape(value["shape"]).copy()
            case "scalar":
                return np.frombuffer(base64.b64decode(value["value"]), _number_type(value["dtype"]))[0]
            case kind:
                raise CheckpointError(
                    f"the checkpoint holds an entry of kind {kind!r}, which this version does not know. "
                    "Update memzoo."
                )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"an entry of the checkpoint cannot be read ({value!r:.80}): {error}"
        ) from error


def _number_type(name: Any) -> np.dtype[Any]:
    dtype = np.dtype(str(name))
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"{name!r} is no kind of number")
    return dtype
