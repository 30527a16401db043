"""Configuration of a mixer: plain data, checked when it is made."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

MAX_SIZE = 2**31 - 1  # of anything that becomes a dimension of a tensor

ConfigT = TypeVar("ConfigT", bound="MixerConfig")


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest valid spelling (several that are equally near), or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    if not close:
        return f"Valid names: {', '.join(known)}."
    ratios = [difflib.SequenceMatcher(None, name, other).ratio() for other in close]
    nearest = sorted(other for other, ratio in zip(close, ratios, strict=True) if ratio == ratios[0])
    return f"Did you mean {' or '.join(map(repr, nearest))}?"


def check_positive(config: object, *names: str) -> None:
    """Raises ValueError unless each named field of `config` is an integer from 1 to `MAX_SIZE`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        check_size(name, value)


def check_size(name: str, value: int) -> None:
    """Raises ValueError for a size that no tensor can have, on which torch would stop with an overflow."""
    if value > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE:,}, got {value:,}. Give a smaller size.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `known`; suggests the nearest."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown. {suggest(str(value), known)}")


def check_kinds(config: Any) -> None:
    """Raises ValueError unless fields declared as bool, float or str (or one of them or None) hold such."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # a class, or its name where annotations are text
        declared = getattr(field.type, "__name__", str(field.type))
        kind = declared.removesuffix(" | None")
        if value is None and kind != declared:
            continue
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be true or false, got {value!r}.")
        if kind == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{field.name} must be a number, got {value!r}.{number_hint(value)}")
        if kind == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} must be text, got {value!r}.")


def number_hint(value: object) -> str:
    """What to do about text in the place of a number."""
    return " YAML reads 1e-5 as text: write 1.0e-5." if isinstance(value, str) else ""


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Fields that every mixer has.

    Fields declared as `bool`, `float` or `str` (with `| None` or without) are checked to hold such values.

    Attributes:
        type: name under which the mixer is registered.
        d_model: width of the tokens.
    """

    type: str
    d_model: int

    def __post_init__(self) -> None:
        check_kinds(self)
        check_positive(self, "d_model")

    @classmethod
    def from_dict(cls: builtins.type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Builds the config; an unknown key is an error that suggests the nearest.

        Raises:
            ValueError: unknown or missing keys, or values out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(
                    f"unknown key {key!r} for mixer {values.get('type', cls.__name__)!r}. "
                    f"{suggest(key, fields)}"
                )
        missing = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and name not in values
        ]
        if missing:
            raise ValueError(
                f"mixer {values.get('type', cls.__name__)!r} needs the keys {missing}. Add them to the "
                "config."
            )
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**frozen)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON, YAML) from which `from_dict` builds an equal config."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, MixerConfig):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
