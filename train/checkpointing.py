"""Training checkpoints as folders: safetensors and JSON sealed by SHA-256, never pickle.

    last.ckpt/
      memzoo_manifest.json     SHA-256 and size of the other two; its appearance makes the checkpoint
      state.json               everything but tensors: loops, schedules, settings
      tensors.safetensors      weights, optimiser, random-number states

A checkpoint is replaced in place: whatever moment the process dies at, the folder holds the old version or
the new one, whole (models/checkpoints/files.py).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import CheckpointIO

from ..models.checkpoints.errors import CheckpointError
from ..models.checkpoints.files import (
    MANIFEST_NAME,
    TRAINING_KIND,
    StrPath,
    peek_folder,
    read_json,
    verify_folder,
    write_folder,
)
from ..models.checkpoints.safetensors_files import read_safetensors, write_safetensors_in_place
from .checkpoint_codec import Encoder, decode

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
TENSORS_NAME = "tensors.safetensors"
FORMAT_VERSION = 1

# Storage that is full, broken or locked. The run is worth more than one save.
STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
)


def save_checkpoint_folder(path: StrPath, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint as a folder, or replaces the one that is there; old or new stays readable.

    Args:
        path: the folder.
        checkpoint: what Lightning hands over, or any tree of plain data, numpy arrays and dense tensors.
            ``global_step`` and ``epoch`` at its top go into the manifest too.

    Raises:
        ValueError: something in it that is neither; the message says where it sits.
        OSError: the storage is full, broken or locked. No partial files are left.
    """
    encoder = Encoder()
    state = {"format_version": FORMAT_VERSION, "checkpoint": encoder.encode(dict(checkpoint))}
    text = json.dumps(state, ensure_ascii=False, allow_nan=False)
    extra = {
        "kind": TRAINING_KIND,
        "global_step": _count(checkpoint.get("global_step")),
        "epoch": _count(checkpoint.get("epoch")),
        "saved_at": time.time(),
    }
    writers = {
        TENSORS_NAME: lambda file: write_safetensors_in_place(file, encoder.tensors),
        STATE_NAME: lambda file: file.write_text(text, encoding="utf-8"),
    }
    write_folder(path, writers, extra=extra)


def load_checkpoint_folder(path: StrPath, map_location: torch.device | str | None = None) -> dict[str, Any]:
    """Reads a checkpoint folder after checking every byte against its SHA-256.

    Args:
        path: the folder.
        map_location: device of the tensors; None is the CPU.

    Raises:
        CheckpointError: nothing there, a folder of another kind, an incomplete save, or damage.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not the folder of a checkpoint" if path.exists() else "does not exist"
        raise CheckpointError(
            f"the checkpoint {str(path)!r} {what} (looked in {Path.cwd()}). Check the path."
        )
    if not (path / MANIFEST_NAME).exists():
        begun = any(path.glob(".*.staged")) or any(path.glob(".*.tmp"))
        what = "was never completed: its first save was cut short" if begun else "is no checkpoint of memzoo"
        raise CheckpointError(f"the folder {str(path)!r} {what}. {_hint(path)}")
    manifest = verify_folder(path, required=True) or {}
    if manifest.get("kind") != TRAINING_KIND:
        raise CheckpointError(
            f"the folder {str(path)!r} holds {manifest.get('kind', 'something')!r}, not a checkpoint of "
            f"training. {_hint(path)}"
        )
    state = read_json(path / STATE_NAME)
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / STATE_NAME} has format_version {state.get('format_version')!r}, this version of memzoo "
            f"reads {FORMAT_VERSION}. Update memzoo."
        )
    # Copied out of the file: a mapped one must not change or go away while the run reads it.
    tensors = {
        name: tensor.clone() if map_location is None else tensor.to(map_location, copy=True)
        for name, tensor in read_safetensors(path / TENSORS_NAME).items()
    }
    checkpoint = decode(state.get("checkpoint"), tensors)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path / STATE_NAME} holds no checkpoint. Save it again.")
    return checkpoint


def newest_checkpoint(folder: StrPath) -> Path | None:
    """The newest complete checkpoint in or below a folder: the most optimiser steps, then the latest save.

    Files are looked at by name and size; `load_checkpoint_folder` checks their content.
    """
    found: list[tuple[int, float, Path]] = []
    for place, names, files in os.walk(folder, followlinks=False):
        if MANIFEST_NAME not in files:
            continue
        names.clear()  # checkpoints hold no checkpoints
        manifest = peek_folder(place)
        if manifest is not None and manifest.get("kind") == TRAINING_KIND:
            step, saved_at = manifest.get("global_step"), manifest.get("saved_at")
            found.append((_count(step) or 0, saved_at if isinstance(saved_at, float) else 0.0, Path(place)))
    return max(found)[2] if found else None


def saved_at(folder: StrPath) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 where that is not known."""
    found = (peek_folder(folder) or {}).get("saved_at")
    return found if isinstance(found, float) else 0.0


class FolderCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as folders. Single files of earlier versions are still read.

    A save that fails because the storage is full, broken or locked does not end the run: it warns, leaves no
    partial files, and keeps the older checkpoints, also those that were to be deleted.

    Attributes:
        failure: why the last save failed; None after one that did not.
        last_saved: the last checkpoint written, or the one the run goes on from; it is complete.
        saved_at: when it was written, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.last_saved: Path | None = None
        self.saved_at: float | None = None
        self._spared: list[Path] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise ValueError(
                "storage_options have no effect on a checkpoint in a local folder. Leave them out."
            )
        path = _local(path)
        try:
            if path.is_file():  # a single file of an earlier version, from which this run goes on
                os.replace(path, path.with_name(f"{path.stem}-single-file{path.suffix}"))
            save_checkpoint_folder(path, checkpoint)
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            self.failure = f"{path} could not be written ({error.strerror})"
            kept = f"The last complete one is {self.last_saved}." if self.last_saved else "There is none yet."
            logger.warning(
                "CHECKPOINT NOT SAVED: %s. %s Training goes on; make room, or stop it with Ctrl-C.",
                self.failure,
                kept,
            )
            return
        self.failure, self.last_saved, self.saved_at = None, path, time.monotonic()
        spared, self._spared = self._spared, []
        for older in spared:
            if older != path:
                self.remove_checkpoint(older)

    def load_checkpoint(
        self, path: StrPath, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = _local(path)
        if path.is_file():
            return _single_file(path)
        location = map_location if isinstance(map_location, (str, torch.device)) else None
        checkpoint = load_checkpoint_folder(path, location)
        self.last_saved = path
        return checkpoint

    def remove_checkpoint(self, path: StrPath) -> None:
        path = _local(path)
        if self.failure is not None:
            self._spared.append(path)  # what was to replace it is not there
            return
        try:
            if path.is_dir() and not path.is_symlink():
                # without its manifest it is no checkpoint any more, whatever a kill leaves of it
                (path / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be deleted (%s).", path, error.strerror)


def _single_file(path: Path) -> dict[str, Any]:
    """A checkpoint of an earlier version, or of Lightning itself."""
    try:
        loaded = TorchCheckpointIO().load_checkpoint(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling what is no pickle may raise anything
        # torch puts advice in front that would let the file run code
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint, or a damaged one ({reason:.120}). {_hint(path)}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(loaded).__name__}, no checkpoint. {_hint(path)}")
    return loaded


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _local(path: StrPath) -> Path:
    if "://" in str(path):
        raise ValueError(f"checkpoints are written to local folders, got {str(path)!r}. Name a local path.")
    return Path(path)


def _hint(path: Path) -> str:
    newest = newest_checkpoint(path.parent)
    return f"The newest one nearby is {str(newest)!r}." if newest else "There is none nearby either."
