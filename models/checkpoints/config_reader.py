"""Reading the `config.json` of a foreign checkpoint, key by key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...layers.parts.state_space import is_number
from ..config import ModelConfig
from .errors import CheckpointError


@dataclass(frozen=True)
class SourceWeight:
    """Name and shape of a weight in its source, and how it differs from ours.

    Attributes:
        name: in the source.
        shape: in the source.
        interleaved_heads: heads whose rows a GGUF file interleaves, 0 for none.
        has_middle_axis: the source has an axis of size 1 in the middle, as the convolutions of torch.
    """

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    has_middle_axis: bool = False


class ConfigReader:
    """Typed access to a `config.json`; every error names the file and the key.

    Args:
        values: the parsed file.
        where: named in errors.
        defaults: what leaving a key out means.
    """

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.values = values
        self.where = where
        self.defaults = defaults

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or its default."""
        if key in self.values and (self.values[key] is not None or key == "sliding_window"):
            return self.values[key]
        if key in self.defaults and self.defaults[key] is not None:
            return self.defaults[key]
        return default

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        # a null number of key/value heads means as many as query heads; a missing one is the family's default
        value = default if key in self.values and self.values[key] is None else self.get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.get(key)
        if not is_number(value) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def require(self, key: str, only: Any) -> None:
        """Raises unless a key has the one value that the backbone knows."""
        value = self.get(key)
        if value != only:
            raise self.wrong(key, value, f"{only!r}, the only one the backbone has")

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value that is not what it should be."""
        what = f"{key}={value!r:.80}" if key in self.values else f"no {key}"
        return CheckpointError(f"{self.where} has {what}, expected {expected}.")


def build_config(where: str, **fields: Any) -> ModelConfig:
    """The ModelConfig of these fields; what it refuses is a fault of the checkpoint.

    Raises:
        CheckpointError: no possible model.
    """
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where} does not describe a possible model: {error}") from error


def check_names(
    where: str, weight_map: Mapping[str, SourceWeight], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares what is there with what the config implies.

    Args:
        where: named in errors.
        weight_map: by any key, the names and shapes that the config implies.
        shapes: name -> shape of what is there.

    Raises:
        CheckpointError: names the first weight that is missing, of no use, or of another shape.
    """
    expected = {source.name: source.shape for source in weight_map.values()}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    if missing:
        extra = f" It has {unexpected[0]!r} instead." if unexpected else ""
        raise CheckpointError(
            f"{where}: {missing[0]!r} is missing ({len(missing)} such).{extra} "
            "The config is of another model, or files are absent."
        )
    if unexpected:
        raise CheckpointError(
            f"{where}: {unexpected[0]!r} belongs to no part of the model ({len(unexpected)} such). "
            "The config is of another model."
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise CheckpointError(
                f"{where}: {name!r} has shape {tuple(shapes[name])}, the config implies {shape}."
            )
