"""What the commands share: finding and loading models, records, progress lines, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..models.decoder import MemoryLM

DType = Literal["float32", "bfloat16"]


def model_place(name: str) -> str:
    """Where the model of this name is; raises ValueError when none is there."""
    from ..models.checkpoints.fetch import locate
    from ..models.checkpoints.folder import checked_place

    return str(checked_place(locate(name)))


def load_for_use(source: str, device: str, dtype: DType) -> MemoryLM:
    """The model of a place, in evaluation mode, where and as the flags say."""
    import torch

    from ..models.checkpoints.folder import load_model

    return load_model(source, dtype=getattr(torch, dtype), device=device_name(device)).eval()


def device_name(name: str) -> str:
    """The device that a flag names; raises ValueError when there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device. Use --device cpu.")
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}.")
    return name


def pad_token_id(tokenizer: Any) -> int | None:
    """The padding token, or the one that ends a text where there is none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def check_output(output: str | None) -> None:
    """Raises ValueError when a record could not be written, before any work is done."""
    if output is not None:
        from ..records import results_folder

        if Path(output).is_dir():
            raise ValueError(f"output is the folder {output!r}. Name a .json file for the record.")
        results_folder(Path(output).parent)


def write_if_asked(output: str | None, name: str, config: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes the record of a command when a file is named for it."""
    if output is not None:
        from ..records import write_record

        write_record(output, name=name, config=config, results=results)


def progress_line(unit: str) -> Callable[[int, int], None] | None:
    """A progress line on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    line: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal line
        # made when the work begins: a line of no work would stay on the screen
        line = line or tqdm(unit=unit, file=sys.stderr, leave=False, total=total)
        line.update(done - line.n)
        if done == total:
            line.close()

    return advance


def say_waiting(what: str) -> None:
    """Says on a terminal what takes a while and has no progress of its own."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{what} ...\n")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text, columns aligned."""
    from .inspection import align_columns

    return align_columns(rows, num_left=2 if len(rows[0]) == 2 else 1) if rows else "(none)"
