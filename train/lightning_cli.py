"""``memzoo train``: Lightning's command line, with two registries in the place of import paths.

``model:`` and ``data:`` name registered types; everything else in them is a plain value checked against the
signature of that type. Import paths (``class_path``) are read only under ``trainer.callbacks``,
``trainer.logger`` and ``trainer.strategy``.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import json
import signal
import types as types_module
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from .. import configs
from ..layers.contract import suggest
from ..records import refuse_content
from .callbacks import SaveModelFolder, TrainingProgress
from .checkpointing import FolderCheckpointIO, newest_checkpoint
from .exact_resume import ExactResume
from .loggers import default_loggers
from .preflight import Preflight
from .stopping import StopOnSignal, check_last_save, way_on

MODEL_TYPES = {"language_model": "memzoo.train.modules:LanguageModelModule"}
DATA_TYPES = {
    "chat": "memzoo.train.data.chat:ChatDataModule",
    "mqar": "memzoo.train.data.mqar_module:MQARDataModule",
    "stream": "memzoo.train.data.stream_module:StreamDataModule",
    "task": "memzoo.train.data.task_module:TaskDataModule",
    "text": "memzoo.train.data.text:TextDataModule",
}
_DEFAULT_TYPES = {"model": "language_model", "data": "text"}
_REGISTRIES = {"model": MODEL_TYPES, "data": DATA_TYPES}

DEFAULT_FOLDER = "runs"
SAVE_MINUTES = 10.0  # the longest time without a checkpoint
_SUBCOMMANDS = ("fit", "validate", "test")
_IMPORTING_SECTIONS = ("trainer.callbacks", "trainer.logger", "trainer.strategy")
_IMPORT_KEYS = ("class_path", "init_args", "dict_kwargs")
_CHECKPOINT_WORDS = ("best", "hpc", "last", "registry")
_SHARDED = (".metadata", "meta.pt", "checkpoint")  # in the folders that sharding strategies write themselves
_PLAIN_TYPES = (bool, dict, float, int, list, str, timedelta, type(None), Path)


class TrainCLI(LightningCLI):
    """LightningCLI over the registered types named in the arguments.

    Args:
        args: the command line after ``memzoo train``, for example ``["fit", "--config", "run.yaml"]``.

    Raises:
        ValueError: an unknown type or key (the nearest is named), an import path where none is allowed, a
            value that the signature does not accept, no configuration, a checkpoint that is not there, or a
            folder for the model that holds something already.
    """

    def __init__(self, args: Sequence[str]) -> None:
        check_configuration(args)
        self.types = chosen_types(args)
        refuse_imports(args, self.types)
        args = with_values(args, _init_types(_target("data", self.types)))
        self._args = args
        strict = {"exit_on_error": False}
        super().__init__(
            _target("model", self.types),
            _target("data", self.types),
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": DEFAULT_FOLDER,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
            seed_everything_default=0,
            parser_kwargs=strict
            | {"prog": "memzoo train", "description": "Train, validate or test a model described in YAML."}
            | {name: dict(strict) for name in _SUBCOMMANDS},
            parser_class=_Parser,
            args=list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in _SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for section, registry in _REGISTRIES.items():
            parser.add_argument(
                f"--{section}.type",
                type=str,
                default=self.types[section],
                help=f"Registered type: {', '.join(sorted(registry))}. The other keys are those of the type.",
            )
        if "weights_only" in parser.get_defaults():
            parser.set_defaults(weights_only=True)
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="Folder for the trained model; by default `model` inside the log folder.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Replace what lies in the folder of --output."
        )

        parser.add_argument(
            "--preflight",
            type=bool,
            default=True,
            help="Say before the first step what the run will need.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        subcommand = args[0] if args else None
        if subcommand in self._subcommand_parsers:
            known = self._subcommand_parsers[subcommand].get_defaults()
            for name, content in _config_files(args):
                check_keys(content, known, name)
            for flag, _ in _flags(args):
                check_flag(flag, known)
        # Not the parent's version, which warns when arguments are handed over in Python.
        self.config = parser.parse_args(args)
        chosen: str = self.config["subcommand"]
        section = self.config[chosen]
        section["ckpt_path"] = find_checkpoint(chosen, section.get("ckpt_path"))
        if chosen == "fit" and section["output"] is not None and not section["overwrite"]:
            refuse_content(section["output"])
        section["overwrite"] = False  # one run's permission; the saved configuration does not pass it on

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: nothing in a checkpoint may change what the user wrote."""

    def instantiate_classes(self) -> None:
        # The types have done their work (they chose the classes), and the folder is no argument of a class.
        section = self.config[self.subcommand]
        chosen = {name: section[name].pop("type") for name in _REGISTRIES}
        ours = {name: section.pop(name) for name in ("output", "overwrite", "preflight")}
        self._folder = SaveModelFolder(ours["output"])
        self._wants_preflight = ours["preflight"]
        super().instantiate_classes()
        for name, value in chosen.items():
            section[name]["type"] = value
        for name, value in ours.items():
            section[name] = value

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; an interrupt says what is left of the run."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            # Lightning turns an interrupt into an exit, and ignores further ones while it cleans up
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt(self._what_is_left(subcommand)) from None
        if subcommand == "fit":
            check_last_save(self.trainer)

    def _what_is_left(self, subcommand: str) -> str:
        if subcommand != "fit":
            return f"before the end of {subcommand}"
        if self.trainer.global_step == 0:
            return "before the first step; no model was written"
        return f"after step {self.trainer.global_step}; no model was written{way_on(self.trainer, None)}"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our progress line and `last.ckpt`, unless the user names others, and the model."""
        trainer_config = self._get(self.config_init, "trainer", default={})
        named = trainer_config.get("callbacks") or []
        callbacks = list(named) if isinstance(named, list) else [named]
        wants_bar = trainer_config.get("enable_progress_bar") is not False
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(TrainingProgress())
        if self.subcommand == "fit":
            callbacks.append(self._folder)
            if self._wants_preflight and not trainer_config.get("fast_dev_run"):
                callbacks.append(Preflight())
            callbacks += [ExactResume(), StopOnSignal(save_minutes=SAVE_MINUTES)]
            keeps = trainer_config.get("enable_checkpointing") is not False
            if keeps and not any(isinstance(callback, Checkpoint) for callback in callbacks):
                callbacks.append(ModelCheckpoint(save_last=True))
        plugins = trainer_config.get("plugins") or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), FolderCheckpointIO()]
        settings = {"callbacks": callbacks, "plugins": plugins}
        if trainer_config.get("logger") in (None, True):
            place = trainer_config.get("default_root_dir") or DEFAULT_FOLDER
            settings["logger"] = default_loggers(place, run_name(self._args))
        return super().instantiate_trainer(**settings, **kwargs)

    @property
    def result(self) -> str | None:
        """What the command says at its end."""
        return None if self._folder.written is None else f"model written to {self._folder.written}"


class _Parser(LightningArgumentParser):
    """A parser that reads no further files from inside a configuration."""

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        names: list[str] = self.add_class_arguments(
            lightning_class,
            nested_key,
            fail_untyped=False,
            instantiate=nested_key != "trainer",
            sub_configs=False,
        )
        return names


def run_training(args: Sequence[str]) -> str | None:
    """Run ``memzoo train`` with these arguments, for example ``["fit", "--config", "run.yaml"]``.

    Returns:
        a line that says where the trained model is, or None where there is none.
    """
    return TrainCLI(configs.with_files(args, "train")).result


def run_name(args: Sequence[str]) -> str:
    """Name of a run: that of its last configuration file, or of the run whose ``config.yaml`` that is."""
    files = [Path(value) for flag, value in _flags(args) if flag == "config"]
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
    given = [flag for flag, _ in _flags(args)]
    described = any(
        flag in ("config", "model", "h", "print_config") or flag.startswith("model.config") or "help" in flag
        for flag in given
    )
    if args and args[0] in _SUBCOMMANDS and not described:
        raise ValueError(
            f"memzoo train {args[0]} needs the description of a run. Give --config with a YAML file or a "
            f"name. {configs.suggestion('', 'train')}"
        )


def find_checkpoint(subcommand: str, checkpoint: str | None) -> str | None:
    """The checkpoint that ``--ckpt_path`` means: of a folder the newest complete one in or below it.

    Args:
        subcommand: fit, validate or test.
        checkpoint: the value of ``--ckpt_path``; Lightning's own words such as ``last`` are left to it.

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
    """The command line with ``--overwrite`` as ``true``, and single texts as lists where a list is wanted.

    Args:
        args: the command line after ``memzoo train``.
        data: types of the arguments of ``data``.
    """
    changed = list(args)
    for position, token in enumerate(args):
        flag, equals, value = token.partition("=")
        following = args[position + 1 : position + 2]
        has_value = bool(equals or (following and not _is_flag(following[0])))
        if token == "--overwrite" and not has_value:
            changed[position] = "--overwrite=true"
        takes_texts = any(
            get_origin(option) in (list, collections.abc.Sequence) and get_args(option) == (str,)
            for option in _options(data.get(flag.removeprefix("--data.")))
        )
        if flag.startswith("--data.") and takes_texts and has_value:
            given = value if equals else following[0]
            if not isinstance(_as_yaml(given), list):
                listed = json.dumps([given])
                changed[position if equals else position + 1] = f"{flag}={listed}" if equals else listed
    return changed


def chosen_types(args: Sequence[str]) -> dict[str, str]:
    """The registered types named in configuration files and flags; the last one counts.

    Raises:
        ValueError: an unknown type; the message names the nearest.
    """
    types = dict(_DEFAULT_TYPES)
    for section, registry in _REGISTRIES.items():
        for name, content in _config_files(args):
            part = content.get(section)
            if part is None:
                continue
            if not isinstance(part, Mapping):
                raise ValueError(
                    f"{name}: {section} must be a mapping with a type, got {part!r}. Write its keys in place."
                )
            types[section] = part.get("type", types[section])
        for flag, value in _flags(args):
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
    signatures = {section: _init_types(_target(section, types)) for section in _REGISTRIES}
    signatures["trainer"] = _init_types(Trainer)
    for name, content in [*_config_files(args), *_nested_flags(args)]:
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


def _config_files(args: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and content of every configuration file named in the arguments, in order.

    Raises:
        ValueError: a missing file, no YAML, or no mapping at its top.
    """
    files = []
    for flag, value in _flags(args):
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


def _flags(args: Sequence[str]) -> list[tuple[str, str]]:
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
    for flag, value in _flags(args):
        nested: Any = _as_yaml(value)
        for part in reversed(flag.rstrip("+").split(".")):
            nested = {part: nested}
        yield "the command line", nested


def _is_flag(token: str) -> bool:
    return token.startswith("--") or token in ("-c", "-h")


def _init_types(target: Any) -> dict[str, Any]:
    """Types of the arguments with which a class is made."""
    return get_type_hints(target.__init__)


def _target(section: str, types: Mapping[str, str]) -> type:
    """The class behind the chosen type of ``model`` or ``data``."""
    module, _, name = _REGISTRIES[section][types[section]].partition(":")
    target: type = getattr(importlib.import_module(module), name)
    return target
