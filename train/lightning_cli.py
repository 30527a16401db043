"""``memzoo train``: Lightning's command line, with two registries in the place of import paths.

``model:`` and ``data:`` name registered types; everything else in them is a plain value checked against the
signature of that type. Import paths (``class_path``) are read only under ``trainer.callbacks``,
``trainer.logger`` and ``trainer.strategy``.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from .. import configs
from ..records import refuse_content
from .callbacks import SaveModelFolder, TrainingProgress
from .checkpointing import FolderCheckpointIO
from .command_line import (
    REGISTRIES,
    SUBCOMMANDS,
    check_configuration,
    check_flag,
    check_keys,
    chosen_types,
    config_files,
    find_checkpoint,
    flags_of,
    init_types,
    refuse_imports,
    run_name,
    target_of,
    with_values,
)
from .exact_resume import ExactResume
from .loggers import default_loggers
from .preflight import Preflight
from .stopping import StopOnSignal, check_last_save, way_on

DEFAULT_FOLDER = "runs"
SAVE_MINUTES = 2.0  # the longest time without a checkpoint


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
        args = with_values(args, init_types(target_of("data", self.types)))
        self._args = args
        strict = {"exit_on_error": False}
        super().__init__(
            target_of("model", self.types),
            target_of("data", self.types),
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
            | {name: dict(strict) for name in SUBCOMMANDS},
            parser_class=_Parser,
            args=list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for section, registry in REGISTRIES.items():
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
            for name, content in config_files(args):
                check_keys(content, known, name)
            for flag, _ in flags_of(args):
                check_flag(flag, known)
        # Not the parent's version, which warns when arguments are handed over in Python.
        self.config = parser.parse_args(args)
        chosen: str = self.config["subcommand"]
        section = self.config[chosen]
        place = None  # of all runs of this name, where the loggers are ours
        if section["trainer"]["logger"] in (None, True):
            place = Path(section["trainer"]["default_root_dir"] or DEFAULT_FOLDER) / run_name(self._args)
        section["ckpt_path"] = find_checkpoint(chosen, section.get("ckpt_path"), place)
        if chosen == "fit" and section["output"] is not None and not section["overwrite"]:
            refuse_content(section["output"])
        section["overwrite"] = False  # one run's permission; the saved configuration does not pass it on

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: nothing in a checkpoint may change what the user wrote."""

    def instantiate_classes(self) -> None:
        # The types have done their work (they chose the classes), and the folder is no argument of a class.
        section = self.config[self.subcommand]
        chosen = {name: section[name].pop("type") for name in REGISTRIES}
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
