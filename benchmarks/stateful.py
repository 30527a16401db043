"""Stateful beside stateless training on documents whose evidence lies in an earlier batch.

    python benchmarks/stateful.py

A document fills four windows, read in four successive batches. The first window names pairs of a key and a
value and asks for each of them once; the second and third hold nothing but filler; the last asks for each
pair again. Rows begin their documents in different batches. The same model is trained on the same tokens in
the same order twice, with and without `carry_state`, and asked on documents that no training has seen. Two
further models, the same one and one with full attention, read whole documents at once, with as many tokens
per step.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from memzoo.models.config import ModelConfig
from memzoo.train.data.batches import BatchSource, ResumableLoader, TokenBatch
from memzoo.train.data.mqar import IGNORE_INDEX
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig

NUM_WINDOWS = 4
TEST_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of the documents.

    Attributes:
        window: tokens per window.
        num_pairs: pairs of a document.
        num_keys, num_values, num_fillers: tokens of each kind; chance is 1 / num_values.
    """

    window: int = 64
    num_pairs: int = 6
    num_keys: int = 32
    num_values: int = 16
    num_fillers: int = 16

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values + self.num_fillers

    def document(self, *seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, (NUM_WINDOWS, window) each."""
        draw = np.random.default_rng(seed)
        shape = (NUM_WINDOWS, self.window)
        tokens = draw.integers(self.num_keys + self.num_values, self.vocab_size, shape)
        labels = np.full(shape, IGNORE_INDEX)
        keys = draw.choice(self.num_keys, self.num_pairs, replace=False)
        values = self.num_keys + draw.integers(0, self.num_values, self.num_pairs)
        tokens[0, : 2 * self.num_pairs] = np.stack([keys, values], 1).ravel()
        for window, first in ((0, 2 * self.num_pairs), (NUM_WINDOWS - 1, 0)):
            places = first + draw.choice(self.window - first, self.num_pairs, replace=False)
            tokens[window, places], labels[window, places] = keys, values
        return tokens, labels


class Documents(BatchSource):
    """Windows of documents, row after row; or whole documents.

    Args:
        task: what a document is.
        seed: of the documents.
        num_rows: rows of a batch of windows; whole documents come in a quarter of them.
        num_batches: batches of one epoch.
        whole: give whole documents.
        only: keep the labels of this window alone.
    """

    def __init__(
        self, task: Task, seed: int, num_rows: int, num_batches: int, *, whole: bool, only: int | None = None
    ) -> None:
        self.task, self.seed, self.num_rows, self._num_batches = task, seed, num_rows, num_batches
        self.whole, self.only = whole, only
        self._document = lru_cache(4 * num_rows)(task.document)

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def batch(self, epoch: int, index: int) -> TokenBatch:
        if self.whole:
            rows = range(self.num_rows // NUM_WINDOWS)
            parts = [self._labelled(self.seed, epoch, index, row) for row in rows]
            tokens, labels = (
                torch.from_numpy(np.stack(part)).flatten(1) for part in zip(*parts, strict=True)
            )
            return TokenBatch(tokens, labels)
        parts, resets = [], []
        for row in range(self.num_rows):
            number, window = divmod(index + row, NUM_WINDOWS)
            tokens, labels = self._labelled(self.seed, epoch, number, row)
            if index < window:  # the document has begun before the first batch: nobody has read its pairs
                labels = np.full_like(labels, IGNORE_INDEX)
            parts.append((tokens[window], labels[window]))
            resets.append(window == 0 or index == 0)
        tokens, labels = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        return TokenBatch(tokens, labels, resets=torch.tensor(resets))

    def _labelled(self, *seed: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = self._document(*seed)
        if self.only is not None:
            hidden = np.arange(NUM_WINDOWS)[:, None] != self.only
            labels = np.where(hidden, IGNORE_INDEX, labels)
        return tokens, labels


class Data(LightningDataModule):
    """Batches of `source` for training."""

    def __init__(self, source: BatchSource) -> None:
        super().__init__()
        self.source = source

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.source)


ARMS: dict[str, dict[str, Any]] = {
    "carried": {"mixer": "based", "carry_state": True, "whole": False},
    "stateless": {"mixer": "based", "carry_state": False, "whole": False},
    "whole documents": {"mixer": "based", "carry_state": False, "whole": True},
    "whole documents, full attention": {"mixer": "attention", "carry_state": False, "whole": True},
}
MIXERS: dict[str, dict[str, Any]] = {
    "based": {"type": "based", "num_heads": 1, "feature_dim": 16},
    "attention": {"type": "attention", "num_heads": 1},
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run reads: rows of a batch of windows, steps, and batches of a test."""

    rows: int = 64
    steps: int = 400
    test_batches: int = 32


def model_config(mixer: str, task: Task) -> ModelConfig:
    """Two layers of width 64: a short convolution, which sees the token before, and the mixer."""
    return ModelConfig(
        vocab_size=task.vocab_size,
        d_model=64,
        layers=[{"type": "base_conv", "conv_size": 3}, MIXERS[mixer]],
        norm="layer",
        initializer_range=0.125,
        tie_embeddings=True,
    )


def train_once(arm: str, seed: int, task: Task, sizes: Sizes, options: Any) -> dict[str, Any]:
    """Train one arm with one seed; accuracy at the questions of the first and of the last window."""
    mixer, carry_state, whole = (ARMS[arm][key] for key in ("mixer", "carry_state", "whole"))
    seed_everything(seed, verbose=False)
    optimizer = OptimizerConfig(lr=options.lr, warmup_steps=sizes.steps // 10, min_lr_ratio=0.0)
    module = LanguageModelModule(
        model_config(mixer, task), optimizer, mixer_init_scale=1.0, carry_state=carry_state
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if str(options.device).startswith("cuda") else "cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        begin = time.process_time()
        trainer.fit(module, datamodule=Data(Documents(task, seed, sizes.rows, sizes.steps, whole=whole)))
        cpu_seconds = time.process_time() - begin
        found = {}
        for name, window in (("near", 0), ("far", NUM_WINDOWS - 1)):
            source = Documents(
                task, TEST_SEED + seed, sizes.rows, sizes.test_batches, whole=whole, only=window
            )
            (measured,) = trainer.test(module, ResumableLoader(source), verbose=False)
            found[f"{name}_accuracy"] = measured["test_accuracy"]
    return {"arm": arm, "seed": seed, **found, "cpu_seconds": cpu_seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write the record after every run, print a table."""
    options_of = common.parser("Stateful beside stateless training.")
    options_of.add_argument("--seeds", type=int, default=3, help="seeds per arm (default: %(default)s)")
    options_of.add_argument("--steps", type=int, default=400, help="steps of a run (default: %(default)s)")
    options_of.add_argument("--lr", type=float, default=0.005, help="peak rate (default: %(default)s)")
    options = options_of.parse_args(arguments)
    common.prepare(options)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    task = Task(window=16, num_pairs=2) if options.quick else Task()
    sizes = Sizes(rows=8, steps=4, test_batches=8) if options.quick else Sizes(steps=options.steps)
    described = {
        "task": asdict(task),
        "windows_per_document": NUM_WINDOWS,
        **asdict(sizes),
        "lr": options.lr,
        "arms": ARMS,
        "models": {name: model_config(name, task).to_dict() for name in MIXERS},
        "threads": torch.get_num_threads(),
        "device": str(options.device),
    }
    runs: list[dict[str, Any]] = []
    for arm in ARMS:
        for seed in range(1 if options.quick else options.seeds):
            run = train_once(arm, seed, task, sizes, options)
            runs.append(run)
            print(f"{arm}, seed {seed}: {run['far_accuracy']:.3f} in {run['cpu_seconds']:.0f} s", flush=True)
            common.save(options, "stateful", described, {"chance": 1 / task.num_values, "runs": runs})
    header = ("arm", "seed", "same window", "earlier batch", "CPU seconds")
    print(common.table([tuple(run.values()) for run in runs], header))
    return 0


if __name__ == "__main__":
    sys.exit(main())
