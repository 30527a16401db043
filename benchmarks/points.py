"""Trainings of small models as points of a study: each is done once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from memzoo.records import write_text_atomically


def kept(
    folder: Path, name: str, asked: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `make` gives, from its file where it has been made for the same settings.

    Args:
        folder: of the files.
        name: what the file name begins with.
        asked: everything that the result depends on, as plain data.
        make: called where there is no file.
    """
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = Path(folder, f"{name}-{digest[:16]}.json")
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(found, indent=1))
    return found


def be_quiet() -> None:
    """Dozens of trainings follow one another: leaves out what each would say."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def fit(module: LightningModule, data: LightningDataModule, device: str) -> float:
    """Trains for one epoch without logs and checkpoints; seconds."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, datamodule=data)
    return time.perf_counter() - begin
