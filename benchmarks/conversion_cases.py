"""Conversions of a tiny model, one per kind of stage, for `kills.py`: each does its work in a folder, goes on
from what it finds there, and returns what it ends with.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.conversion.recipe import ConversionRecipe
from memzoo.train.conversion.run import Comparison, convert_and_compare
from memzoo.train.conversion.stage import StageSettings

TARGET = {"type": "lolcats", "window_size": 6, "num_sinks": 2, "feature_dim": 3}
SIZES = {"seq_len": 24, "batch_size": 2}
ALIGN = {"name": "align", "loss": {"mixer_out": 1.0}, "train": "new", "steps": 8, "lr": 0.01, **SIZES}
TUNE = {
    "name": "tune",
    "loss": {"kl": 1.0},
    "train": "lora",
    "steps": 8,
    "lr": 0.003,
    "lora_rank": 2,
    "new_lr_scale": 3.0,
    **SIZES,
}
LONG = {
    "name": "long",
    "loss": {"ce": 1.0, "kl": 0.5},
    "train": "all",
    "steps": 6,
    "lr": 0.003,
    "accumulate": 2,
    "window_dropout": 0.5,
    "recompute": True,
    "seq_len": 40,
}
MIXERS = {**ALIGN, "loss": {"hidden": 1.0}, "train": "mixers"}
# what is killed -> stages, and whether the control and the ablation are trained as well
RECIPES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "alignment of new parameters": ([ALIGN], False),
    "alignment of whole mixers": ([MIXERS], False),
    "low-rank tune": ([TUNE], False),
    "everything trained, accumulated, with window dropout": ([LONG], False),
    "all stages, control and ablation": ([ALIGN, TUNE, LONG], True),
}


def conversion_case(name: str) -> Callable[[Path], Mapping[str, Any]]:
    """The conversion of one of `RECIPES`: returns all weights, and the losses of all steps and rows."""
    stages, is_compared = RECIPES[name]

    def run(folder: Path) -> Mapping[str, Any]:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        os.chdir(folder)
        text = Path("book.txt")
        if not text.exists():
            words = random.Random(0).choices(["the", "brown", "fox", "over", "a", "dog", "."], k=2000)
            text.write_text(" ".join(words), encoding="utf-8")
        recipe = ConversionRecipe(target=TARGET, stages=stages, data={"files": ["book.txt"]}, seed=5)
        rows, conversions = convert_and_compare(
            teacher(),
            "bytes",
            recipe,
            folder,
            tokens={"book": torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))},
            comparison=Comparison(
                control=is_compared, ablations=is_compared, num_windows=2, window_size=48, first_token=0
            ),
            settings=StageSettings(progress=False, accelerator="cpu", save_seconds=0.0),
        )
        ends: dict[str, Any] = {f"row {row.name}": row.losses["book"].losses for row in rows}
        for kind, conversion in conversions.items():
            for weight, tensor in conversion.model.state_dict().items():
                ends[f"{kind} {weight}"] = tensor
            for facts in conversion.stages:
                for loss, values in facts.history.items():
                    ends[f"{kind} {facts.name} {loss}"] = torch.tensor(values, dtype=torch.float64)
        return ends

    return run


def teacher() -> MemoryLM:
    """Two small layers of attention over bytes, the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257,
        d_model=16,
        layers={"type": "attention"},
        num_layers=2,
        mixer_defaults={"num_heads": 2, "num_kv_heads": 1},
        mlp={"type": "swiglu", "d_ff": 24},
        tie_embeddings=True,
    )
    return MemoryLM(config).eval()
