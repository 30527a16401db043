"""The command line of ``memzoo train`` before it is parsed: what it names, and what it may not name.

``model:`` and ``data:`` name registered types; import paths (``class_path``) are read only under
``trainer.callbacks``, ``trainer.logger`` and ``trainer.strategy``.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import json
import types as types_module
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from .. import configs
from ..layers.contract import suggest
from .checkpointing import newest_checkpoint, saved_at

MODEL_TYPES = {"language_model": "memzoo.train.modules:LanguageModelModule"}
DATA_TYPES = {
    "chat": "memzoo.train.data.chat:ChatDataModule",
    "mqar": "memzoo.train.data.mqar_module:MQARDataModule",
    "stream": "memzoo.train.data.stream_module:StreamDataModule",
    "task": "memzoo.train.data.task_module:TaskDataModule",
    "text": "memzoo.train.data.text:TextDataModule",
    "text_task": "memzoo.train.data.text_task_module:TextTaskDataModule",
}
_DEFAULT_TYPES = {"model": "language_model", "data": "text"}
REGISTRIES = {"model": MODEL_TYPES, "data": DATA_TYPES}

SUBCOMMANDS = ("fit", "validate", "test")
_IMPORTING_SECTIONS = ("trainer.callbacks", "trainer.logger", "trainer.strategy")
_IMPORT_KEYS = ("class_path", "init_args", "dict_kwargs")
_CHECKPOINT_WORDS = ("best", "hpc", "last", "registry")
_SHARDED = (".metadata", "meta.pt", "checkpoint")  # in the folders that sharding strategies write themselves
_PLAIN_TYPES = (bool, dict, float, int, list, str, timedelta, type(None), Path)


def run_name(args: Sequence[str]) -> str:
    """Name of a run: that of its last configuration file, or of the run whose ``config.yaml`` that is."""
    files = [Path(value) for flag, value in flags_of(args) if flag == "config"]
    if not files:
        return "run"
    path = files[-1]
    of_a_run = path.stem == "config" and path.resolve().parent.name.startswith("version_")
    return path.resolve().parents[1].name if of_a_run else path.stem


def check_configuration(args: Sequence[str]) -> None:
    """Refuse a command line that describes no model.

    Raises:
        ValueError: the message lists the shipped configurations.
    """
    given = [flag for flag, _ in flags_of(args)]
    described = any(
        flag in ("config", "model", "h", "print_config") or flag.startswith("model.config") or "help" in flag
        for flag in given
    )
    if args and args[0] in SUBCOMMANDS and not described:
        raise ValueError(
            f"memzoo train {args[0]} needs the description of a run. Give --config with a YAML file or a "
            f"name. {configs.suggestion('', 'train')}"
        )


def find_checkpoint(subcommand: str, checkpoint: str | None, place: Path | None = None) -> str | None:
    """The checkpoint that ``--ckpt_path`` means: of a folder the newest complete one in or below it.

    Args:
        subcommand: fit, validate or test.
        checkpoint: the value of ``--ckpt_path``. ``last`` is that of the run below ``place`` which
            was written to last; Lightning's other words are left to it.
        place: folder of the runs of this name; None leaves ``last`` to Lightning too.

    Raises:
        ValueError: a checkpoint that is not there or not complete, or a measurement without one; the message
            lists the checkpoints that lie nearby.
    """
    if checkpoint is None:
        if subcommand == "fit":
            return None
        raise ValueError(
            f"memzoo train {subcommand} needs a checkpoint, or it would measure random weights. Name one "
            "with --ckpt_path, for example --ckpt_path runs/NAME/version_0/checkpoints/last.ckpt."
        )
    if checkpoint == "last" and place is not None:
        # not simply the newest below it: an older run may have made more steps
        newest_of_runs = map(newest_checkpoint, place.glob("version_*"))
        checkpoint = str(max(filter(None, newest_of_runs), key=saved_at, default=place))
    path = Path(checkpoint)
    if checkpoint in _CHECKPOINT_WORDS or "://" in checkpoint or path.is_file():
        return checkpoint
    newest = newest_checkpoint(path)
    if newest is not None:
        return str(newest)
    if any((path / name).exists() for name in _SHARDED):
        return checkpoint
    folder = path if path.is_dir() and path.suffix != ".ckpt" else path.parent
    found = sorted(str(file) for file in folder.glob("*.ckpt") if file != path)
    what = "holds no complete checkpoint" if path.is_dir() else "does not exist"
    there = f"There are {', '.join(found)}." if found else f"There is no .ckpt in {str(folder)!r}."
    raise ValueError(f"the checkpoint {checkpoint!r} {what}. {there}")


def with_values(args: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """The command line with ``--overwrite`` as ``true``, and texts as a list where a list is wanted.

    Args:
        args: the command line after ``memzoo train``.
        data: types of the arguments of ``data``.
    """
    changed: list[str] = []
    rest = list(args)
    while rest:
        token = rest.pop(0)
        flag, equals, value = token.partition("=")
        count = next((index for index, item in enumerate(rest) if _is_flag(item)), len(rest))
        values = [value] if equals else rest[:count]
        takes_texts = flag.startswith("--data.") and any(
            get_origin(option) in (list, collections.abc.Sequence) and get_args(option) == (str,)
            for option in _options(data.get(flag.removeprefix("--data.")))
        )
        if token == "--overwrite" and not values:
            token = "--overwrite=true"
        elif takes_texts and values:
            written = " ".join(values)
            token = f"{flag}={written if isinstance(_as_yaml(written), list) else json.dumps(values)}"
            if not equals:
                del rest[:count]
        changed.append(token)
    return changed


def chosen_types(args: Sequence[str]) -> dict[str, str]:
    """The registered types named in configuration files and flags; the last one counts.

    Raises:
        ValueError: an unknown type; the message names the nearest.
    """
    types = dict(_DEFAULT_TYPES)
    for section, registry in REGISTRIES.items():
        for name, content in config_files(args):
            part = content.get(section)
            if part is None:
                continue
            if not isinstance(part, Mapping):
                raise ValueError(
                    f"{name}: {section} must be a mapping with a type, got {part!r}. Write its keys in place."
                )
            types[section] = part.get("type", types[section])
        for flag, value in flags_of(args):
            if flag == f"{section}.type":
                types[section] = value
        if types[section] not in registry:
            raise ValueError(
                f"{section} type {types[section]!r} is unknown. {suggest(str(types[section]), registry)}"
            )
    return types


def refuse_imports(args: Sequence[str], types: Mapping[str, str]) -> None:
    """Refuse import paths in any place that may not name them, before a parser could follow one.

    The parser would import the module that a string names wherever a signature asks for a class or a
    dataclass, even if only to report that the class does not fit. So this check walks the signatures itself
    and lets through plain values only.

    Args:
        args: the command line after ``memzoo train``.
        types: chosen types, from `chosen_types`.

    Raises:
        ValueError: the message names the key.
    """
    signatures = {section: init_types(target_of(section, types)) for section in REGISTRIES}
    signatures["trainer"] = init_types(Trainer)
    for name, content in [*config_files(args), *_nested_flags(args)]:
        _refuse_import_keys(content, "", name)
        for section, hints in signatures.items():
            values = content.get(section, {})
            if not isinstance(values, Mapping):
                raise ValueError(
                    f"{name}: {section} must be a mapping, got {values!r}. "
                    "Write its keys in place, or one by one as flags."
                )
            for key, value in values.items():
                path = f"{section}.{key}"
                if section != "trainer":
                    _refuse_bare_names(hints.get(key), value, path, name)
                elif path not in _IMPORTING_SECTIONS and _may_be_class(hints.get(key)) and "." in str(value):
                    raise ValueError(
                        f"{name}: {path} must be one of Lightning's own short names, got {value!r}."
                    )


def check_keys(content: Mapping[str, Any], known: Namespace, name: str) -> None:
    """Refuse a key that no signature has.

    Args:
        content: a configuration file.
        known: defaults of the parser, which hold every key.
        name: the file, for the message.

    Raises:
        ValueError: the message names the key and the nearest valid one.
    """
    for path in _paths(content):
        _check_path(path, known, name)


def check_flag(flag: str, known: Namespace) -> None:
    """Refuse a flag that no signature has; as `check_keys`."""
    if flag not in ("config", "print_config", "help", "ckpt_path"):
        _check_path(tuple(flag.rstrip("+").split(".")), known, "the command line")


def _check_path(path: tuple[str, ...], known: Namespace, name: str) -> None:
    branch: Any = known
    for depth, part in enumerate(path):
        if not isinstance(branch, Namespace):
            return  # the inside of a value; its own type checks it
        children = set(vars(branch))
        if part not in children:
            where = ".".join(path[:depth]) or "the top level"
            raise ValueError(f"{name}: unknown key {part!r} in {where}. {suggest(part, children)}")
        branch = branch[part]


def _paths(content: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys whose value is no mapping, and of empty mappings."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _paths(value, (*prefix, str(key)))
    else:
        yield prefix


def _refuse_import_keys(content: Any, path: str, name: str) -> None:
    """Refuse the keys that announce an import path, also inside strings that hold YAML."""
    if any(path == section or path.startswith(f"{section}.") for section in _IMPORTING_SECTIONS):
        return
    if isinstance(content, str):
        content = _as_yaml(content)
    if isinstance(content, Mapping):
        for key, value in content.items():
            inner = f"{path}.{key}" if path else str(key)
            if set(str(key).split(".")) & set(_IMPORT_KEYS):
                raise ValueError(
                    f"{name}: {inner} names an import path. Only {', '.join(_IMPORTING_SECTIONS)} "
                    "may do that; model and data name registered types with `type`."
                )
            _refuse_import_keys(value, inner, name)
    elif isinstance(content, (list, tuple)):
        for item in content:
            _refuse_import_keys(item, path, name)


def _refuse_bare_names(annotation: Any, value: Any, path: str, name: str) -> None:
    """Refuse anything but plain data where a signature asks for a dataclass or a list of them."""
    value = _as_yaml(value) if isinstance(value, str) else value
    for option in _options(annotation):
        if dataclasses.is_dataclass(option):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{name}: {path} must be a mapping, got {value!r}. Write its keys in place.")
            hints = get_type_hints(option)
            for key, item in (value or {}).items():
                if key not in hints:
                    raise ValueError(f"{name}: unknown key {key!r} in {path}. {suggest(str(key), hints)}")
                _refuse_bare_names(hints.get(key), item, f"{path}.{key}", name)
        elif get_origin(option) in (list, tuple, collections.abc.Sequence):
            for item_type in get_args(option):
                items = value if isinstance(value, (list, tuple)) else [value]
                for item in items:
                    _refuse_bare_names(item_type, item, path, name)


def _may_be_class(annotation: Any) -> bool:
    """Whether a value of this type may be an instance of a class, which the parser would look up."""
    for option in _options(annotation):
        if get_origin(option) is not None:
            if get_origin(option) is not Literal and any(_may_be_class(item) for item in get_args(option)):
                return True
        elif isinstance(option, type) and option not in _PLAIN_TYPES:
            return True
    return False


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types_module.UnionType):
        return tuple(option for member in get_args(annotation) for option in _options(member))
    return (annotation,)


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def config_files(args: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and content of every configuration file named in the arguments, in order.

    Raises:
        ValueError: a missing file, no YAML, or no mapping at its top.
    """
    files = []
    for flag, value in flags_of(args):
        if flag != "config":
            continue
        path = Path(value)
        if not path.is_file():
            raise ValueError(
                f"there is no configuration file {value!r} (looked in {Path.cwd()}). Check the path. "
                f"{configs.suggestion(value, 'train')}"
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{value} is not readable as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{value} must hold a mapping (model:, data:, trainer:), got {type(content).__name__}."
            )
        files.append((value, content))
    return files


def flags_of(args: Sequence[str]) -> list[tuple[str, str]]:
    """Every ``--flag value`` and ``--flag=value`` as (flag without dashes, value)."""
    flags = []
    position = 1 if args and not args[0].startswith("-") else 0
    while position < len(args):
        token = args[position]
        position += 1
        if not token.startswith("-") or token == "--":
            continue
        name, equals, value = token.partition("=")
        if not equals and position < len(args) and not _is_flag(args[position]):
            value = args[position]
            position += 1
        name = name.lstrip("-")
        flags.append(("config" if name == "c" else name, value))
    return flags


def _nested_flags(args: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every flag as the mapping that a configuration file would hold, ``a.b=1`` as ``{a: {b: 1}}``."""
    for flag, value in flags_of(args):
        nested: Any = _as_yaml(value)
        for part in reversed(flag.rstrip("+").split(".")):
            nested = {part: nested}
        yield "the command line", nested


def _is_flag(token: str) -> bool:
    return token.startswith("--") or token in ("-c", "-h")


def init_types(target: Any) -> dict[str, Any]:
    """Types of the arguments with which a class is made."""
    return get_type_hints(target.__init__)


def target_of(section: str, types: Mapping[str, str]) -> type:
    """The class behind the chosen type of ``model`` or ``data``."""
    module, _, name = REGISTRIES[section][types[section]].partition(":")
    target: type = getattr(importlib.import_module(module), name)
    return target
