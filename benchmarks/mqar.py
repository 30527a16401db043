"""Recall on MQAR: the shipped BASED run beside the same model with a window of 16 tokens in its place.

    python benchmarks/mqar.py

Runs `memzoo train fit` on `train/mqar_based` and `train/mqar_window` with several seeds, as the
configurations stand, and tests each model on 1,000 examples that no training has seen.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import yaml

from memzoo import cli, configs
from memzoo.models.checkpoints.folder import load_model
from memzoo.train.data.mqar import MQARConfig
from memzoo.train.evaluate import recall_on_mqar

CONFIGURATIONS = ("train/mqar_based", "train/mqar_window")
TEST_SEED = 2**32 - 1
QUICK = [
    "--data.train_segments=[{input_seq_len: 128, num_kv_pairs: 8, num_examples: 256}]",
    "--trainer.max_epochs=1",
]


def train_once(name: str, seed: int, options: Any, folder: Path) -> dict[str, Any]:
    """Train one configuration with one seed and test it."""
    device = "gpu" if str(options.device).startswith("cuda") else "cpu"
    logger = (
        f"[{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {folder}, name: log}}}}]"
    )
    arguments = [
        *("train", "fit", "--config", name, f"--seed_everything={seed}", f"--data.seed={seed}"),
        *(f"--trainer.accelerator={device}", f"--trainer.logger={logger}", f"--output={folder / 'model'}"),
        "--trainer.enable_checkpointing=false",
        *(QUICK if options.quick else ()),
    ]
    begin = time.perf_counter()
    if cli.main(arguments) != 0:
        raise SystemExit(f"training {name} with seed {seed} failed")
    seconds = time.perf_counter() - begin
    data = yaml.safe_load(configs.find(name).read_text(encoding="utf-8"))["data"]
    (segment,) = data["train_segments"]
    task = MQARConfig(
        vocab_size=data["vocab_size"],
        input_seq_len=segment["input_seq_len"],
        num_kv_pairs=segment["num_kv_pairs"],
        num_examples=100 if options.quick else 1000,
        power_a=data["power_a"],
        seed=TEST_SEED,
    )
    tested = recall_on_mqar(load_model(folder / "model"), task)
    with next(folder.glob("log/*/metrics.csv")).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_accuracy")]
    return {
        "configuration": name,
        "seed": seed,
        "seconds": seconds,
        "test_accuracy": tested["accuracy"],
        "val_accuracy": [float(row["val_accuracy"]) for row in rows],
        "val_step": [int(row["step"]) + 1 for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table, write the record."""
    options_of = common.parser("Recall on MQAR: BASED beside a window.")
    options_of.add_argument(
        "--seeds", type=int, default=3, help="seeds per configuration (default: %(default)s)"
    )
    options = options_of.parse_args(arguments)
    common.prepare(options)
    runs = []
    for seed in range(1 if options.quick else options.seeds):
        for name in CONFIGURATIONS:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(train_once(name, seed, options, Path(folder)))
            print(
                f"{name} seed {seed}: {runs[-1]['test_accuracy']:.4f} in {runs[-1]['seconds']:.0f} s",
                flush=True,
            )
    rows = [(run["configuration"], run["seed"], run["test_accuracy"], run["seconds"]) for run in runs]
    print(common.table(rows, ("configuration", "seed", "accuracy", "seconds")))
    described = {
        name: yaml.safe_load(configs.find(name).read_text(encoding="utf-8")) for name in CONFIGURATIONS
    }
    common.save(
        options,
        "mqar",
        {"configurations": described, "threads": torch.get_num_threads(), "device": str(options.device)},
        {"runs": runs},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
