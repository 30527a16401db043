"""The command `memzoo`: a table of commands, each a typed function that is imported when it is called."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, configs

DEBUG_VARIABLE = "MEMZOO_DEBUG"


@dataclass(frozen=True)
class Command:
    """One entry of the table.

    Attributes:
        summary: the line in `memzoo --help`.
        target: `module:function`, or a mapping from sub-command to such a target.
        takes_arguments: the functions parse the arguments by themselves, the sub-command included, instead of
            having their signatures read.
    """

    summary: str
    target: str | Mapping[str, str]
    takes_arguments: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train, validate or test a model described in YAML (fit, validate, test)",
        dict.fromkeys(("fit", "validate", "test"), "memzoo.train.lightning_cli:run_training"),
        takes_arguments=True,
    ),
    "convert": Command(
        "turn a pretrained model into a memory hybrid", "memzoo.train.convert_command:convert"
    ),
    "evaluate": Command(
        "measure models: perplexity by position, speed, recall; compare records, show them on a page",
        {
            "perplexity": "memzoo.train.evaluate_command:evaluate_perplexity",
            "mqar": "memzoo.train.evaluate_command:evaluate_mqar",
            "speed": "memzoo.train.evaluate_command:evaluate_speed",
            "task": "memzoo.train.task_commands:evaluate_task",
            "compare": "memzoo.train.evaluate_command:compare",
            "page": "memzoo.train.report_command:page",
            "all": "memzoo.train.report_command:evaluate_all",
        },
    ),
    "generate": Command("continue a prompt", "memzoo.train.generate_command:generate"),
    "inspect": Command(
        "parameters, state bytes and FLOPs per token of every layer", "memzoo.train.inspect_command:inspect"
    ),
    "list": Command(
        "mixers, texts, configurations and kernels that are there", "memzoo.train.inspect_command:list_all"
    ),
    "bench": Command("time one mixer at several lengths", "memzoo.train.inspect_command:bench"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `memzoo` on the command line; None takes it from the process.

    Returns:
        exit status: 0 done, 1 a run without its last checkpoint, 2 a mistake of the user (one clean line on
        stderr), 130 interrupted, 143 stopped by SIGTERM. With `--debug` as the first argument, or
        MEMZOO_DEBUG set, a mistake shows its traceback instead.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if args[:1] == ["--debug"]:
        debug, args = True, args[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"memzoo {__version__}\n")
        return 0
    try:
        return run_command(args[0], args[1:])
    except KeyboardInterrupt as stop:
        # a run that has begun says itself what is left of it
        left = {
            "train": "before the first step; nothing was written",
            "convert": "outside of a stage. Give the same command again to go on.",
        }
        sys.stderr.write(f"\nmemzoo: interrupted {str(stop) or left.get(args[0], '')}".rstrip() + "\n")
        return 130
    except SystemExit as stop:
        line = getattr(stop, "line", None)  # of a run that ended before its time
        if line is None:
            raise
        sys.stderr.write(f"\nmemzoo: {line}\n")
        return int(stop.code or 0)
    except BrokenPipeError:
        # The reader of our output went away (`memzoo list | head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_mistake(error):
            raise
        sys.stderr.write(f"memzoo: error: {' '.join(str(error).split())}\n")
        return 2


def usage() -> str:
    """The text of `memzoo --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: memzoo COMMAND [ARGUMENTS]\n\n"
        "Train, convert and measure memory architectures for long-context language models.\n\n"
        + "\n".join(lines)
        + "\n\n`memzoo COMMAND --help` lists the arguments of a command, "
        "`memzoo --debug COMMAND ...` shows tracebacks.\n"
    )


def run_command(name: str, args: Sequence[str]) -> int:
    """Look up a command, give it its arguments, and print what it returns."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}. {_suggest(name, list(COMMANDS))}")
    _quieten()
    command = COMMANDS[name]
    target = command.target
    args = configs.with_files(args, name)
    if isinstance(target, Mapping):
        if not args or args[0] in ("-h", "--help"):
            sys.stdout.write(_choices(name, target))
            return 0
        if args[0] not in target:
            raise ValueError(f"memzoo {name} knows no {args[0]!r}. {_suggest(args[0], list(target))}")
        target = target[args[0]]
        if not command.takes_arguments:
            name, args = f"{name} {args[0]}", args[1:]
    result = _load(target)(args) if command.takes_arguments else _run_typed(name, target, args)
    if result is not None:
        sys.stdout.write(f"{result}\n")
    return 0


def _quieten() -> None:
    """Drop what Lightning says that is not about this run, not to be acted upon, or said by us."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    # a conversion has many trainers, and each would say the last five
    dropped = (
        "Tip:",
        "Detected KeyboardInterrupt",
        "GPU available: False",
        "TPU available: False",
        "Automatic Mixed Precision",
        "`Trainer.fit` stopped: `max_",
        "`weights_only` was not set",
    )
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(
            lambda record: not any(words in record.getMessage() for words in dropped)
        )


def _choices(name: str, subcommands: Mapping[str, str]) -> str:
    """The help of a command that has sub-commands; it loads nothing."""
    summary = COMMANDS[name].summary
    lines = "".join(f"  memzoo {name} {choice} --help\n" for choice in subcommands)
    return (
        f"usage: memzoo {name} {{{','.join(subcommands)}}} [ARGUMENTS]\n\n"
        f"{summary[0].upper()}{summary[1:]}.\n\n{lines}"
    )


def _run_typed(name: str, target: str, args: list[str]) -> Any:
    """Read the arguments from the signature of a function and call it."""
    from jsonargparse import ArgumentError, ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise ValueError(f"{message} See `{self.prog} --help`.") from ex

    function = _load(target)
    _refuse_unknown_flags(name, function, args)
    try:
        return auto_cli(
            function,
            args=_with_values(function, args),
            as_positional=False,
            prog=f"memzoo {name}",
            description=_description(function),
            parser_class=Parser,
        )
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _description(function: Callable[..., Any]) -> str:
    """What the docstring says before its arguments: all of it, where the parser would take one sentence."""
    import inspect

    return (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip()


def _refuse_unknown_flags(name: str, function: Callable[..., Any], args: Sequence[str]) -> None:
    """Name the nearest flag for one that the function does not have."""
    import inspect

    known = [*inspect.signature(function).parameters, "config", "help", "print_config"]
    for token in args:
        if token.startswith("--"):
            flag = token[2:].partition("=")[0]
            if flag.split(".")[0].rstrip("+") not in known:
                nearest = _suggest(flag, known).replace("'", "")
                raise ValueError(f"memzoo {name} has no flag --{flag}. {nearest}")


def _with_values(function: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """The arguments with a bare switch as `--flag=true`, and the values of a list as one list."""
    import collections.abc
    from typing import get_args, get_origin, get_type_hints

    types = get_type_hints(function)
    changed: list[str] = []
    rest = list(args)
    while rest:
        token = rest.pop(0)
        flag, equals, value = token.partition("=")
        wanted = types.get(flag[2:]) if flag.startswith("--") else None
        count = next((index for index, item in enumerate(rest) if item.startswith("--")), len(rest))
        if wanted is bool and not equals and not count:
            token = f"{flag}=true"
        elif get_origin(wanted) is collections.abc.Sequence and (equals or count):
            values = [value] if equals else rest[:count]
            if not equals:
                del rest[:count]
            if len(values) > 1 or not values[0].startswith("["):
                is_text = get_args(wanted)[0] is str
                values = [f"[{', '.join(json.dumps(item) if is_text else item for item in values)}]"]
            token = f"{flag}={values[0]}"
        changed.append(token)
    return changed


def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _is_mistake(error: Exception) -> bool:
    """Whether an error speaks to the user (a value, a missing file) and not of a fault in the program."""
    if isinstance(
        error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    ):
        return True
    return isinstance(error, ModuleNotFoundError) or type(error).__name__ in (
        "ArgumentError",
        "MisconfigurationException",
    )


def _suggest(name: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(known)}."


if __name__ == "__main__":
    sys.exit(main())
