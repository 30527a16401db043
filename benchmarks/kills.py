"""Runs that are killed at random moments, and what they end with.

    python benchmarks/kills.py            50 kills of each case, 50 kills during saves; record kills.json
    python benchmarks/kills.py --quick    3 of each

A case is a function ``run(folder)`` that does its work in a folder, goes on from what it finds there, and
returns what it ends with: name -> tensor or number. It is run once undisturbed; then it is started again and
again in a folder of its own and killed (SIGKILL) until it comes to its end, with as many ends as it takes for
the kills asked for. All ends have to be the same, bit for bit.

The children are forked from this process, which has imported everything and computed nothing, so that a start
costs milliseconds. Needs a system with `fork`.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import yaml
from conversion_cases import RECIPES, conversion_case

from memzoo import cli
from memzoo.models.checkpoints.files import peek_folder
from memzoo.records import write_text_atomically
from memzoo.train import lightning_cli  # noqa: F401  # before the children are forked
from memzoo.train.checkpointing import load_checkpoint_folder, newest_checkpoint, save_checkpoint_folder

Ends = Mapping[str, Any]
Case = Callable[[Path], Ends]

# Shuffled text read by two workers, accumulated gradients, validations inside an epoch and two epochs.
RUN = {
    "seed_everything": 3,
    "model": {
        "type": "language_model",
        "config": {
            "vocab_size": 257,
            "d_model": 16,
            "layers": [
                {"type": "sliding_window", "window_size": 4, "num_heads": 2},
                {"type": "based", "feature_dim": 4, "num_heads": 2},
            ],
        },
        "optimizer": {"lr": 0.01, "warmup_steps": 4},
    },
    "data": {"type": "text", "files": ["book.txt"], "seq_len": 32, "batch_size": 2, "num_workers": 2},
    "trainer": {
        "max_steps": 24,
        "accumulate_grad_batches": 3,
        "val_check_interval": 7,
        "limit_val_batches": 2,
        "limit_train_batches": 31,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True},
            }
        ],
    },
}


# Documents of several windows, read through by rows that carry their memory from batch to batch.
CARRIED_RUN = {
    **RUN,
    "model": {**RUN["model"], "carry_state": True, "recompute": True},
    "data": {**RUN["data"], "files": ["books.jsonl"], "contiguous": True},
}


def train_text(folder: Path, run: Mapping[str, Any] = RUN) -> Ends:
    """`memzoo train fit` on a text: weights, carried memory and every logged number."""
    os.chdir(folder)
    drawn = random.Random(0)
    words = drawn.choices(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy"], k=3000)
    write_text_atomically("book.txt", " ".join(words))
    cuts = [0, *sorted(drawn.sample(range(1, 3000), k=15)), 3000]
    books = [" ".join(words[low:high]) for low, high in zip(cuts, cuts[1:], strict=False)]
    write_text_atomically("books.jsonl", "".join(json.dumps({"text": book}) + "\n" for book in books))
    write_text_atomically("text.yaml", yaml.safe_dump(dict(run)))
    go_on = [] if newest_checkpoint("runs") is None else ["--ckpt_path", "runs"]
    status = cli.main(["train", "fit", "--config", "text.yaml", "--output", "model", "--overwrite", *go_on])
    if status:
        raise RuntimeError(f"memzoo train ended with status {status}")
    last = newest_checkpoint("runs")
    assert last is not None
    checkpoint = load_checkpoint_folder(last)
    carried = checkpoint["memzoo"].get("carried", {}).get("train", {}).get("tensors", {})
    memory = {f"memory {name}": tensor for name, tensor in carried.items()}
    return {**checkpoint["state_dict"], **memory, **logged_numbers(Path("runs"))}


def logged_numbers(folder: Path) -> dict[str, str]:
    """Every number in the logs of all parts of a run, as text; one that was logged twice has to be the same.

    Raises:
        RuntimeError: two parts disagree.
    """
    numbers: dict[str, str] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    key = f"{name} at step {row['step']}"
                    if value and numbers.setdefault(key, value) != value:
                        raise RuntimeError(
                            f"{key} is {numbers[key]} in one part of the run and {value} in another"
                        )
    return numbers


CASES: dict[str, Case] = {
    "train text": train_text,
    "train with carried memory": partial(train_text, run=CARRIED_RUN),
    **{f"convert: {name}": conversion_case(name) for name in RECIPES},
}


def in_child(function: Callable[[], None], output: Path) -> int:
    """Forks a child that calls the function and ends; what it says goes to a file.

    Returns:
        its process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        function()
        os._exit(0)
    except BaseException:  # noqa: BLE001  # whatever it is, the child goes no further than here
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def killed_or_done(child: int, seconds: float | None) -> bool:
    """Waits for a child, and kills it after that many seconds.

    Returns:
        whether it came to its end.

    Raises:
        RuntimeError: it failed.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"a run failed with status {os.waitstatus_to_exitcode(status)}")
    return True


def kill_case(case: Case, place: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills a case until it has been killed that often, and compares every end with the undisturbed one.

    Args:
        case: what to run.
        place: an empty folder.
        kills: how often to kill.
        seed: of the moments.

    Returns:
        figures for a record: ``different`` names what was not the same, and is empty when all is well.
    """
    moments = random.Random(seed)

    def run(folder: Path) -> Callable[[], None]:
        def work() -> None:
            ends = dict(case(folder))
            save_checkpoint_folder(folder / "ends", {"ends": ends})

        return work

    def start(folder: Path, seconds: float | None) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        return killed_or_done(in_child(run(folder), folder / "output.txt"), seconds)

    begin = time.monotonic()
    start(place / "undisturbed", None)
    duration = time.monotonic() - begin
    expected = load_checkpoint_folder(place / "undisturbed" / "ends")["ends"]

    num_kills, num_ends, steps, different = 0, 0, [], []
    while num_kills < kills or num_ends == 0:
        folder = place / f"killed_{num_ends}"
        seconds = moments.uniform(0.0, duration) if num_kills < kills else None
        if not start(folder, seconds):
            num_kills += 1
            steps.append(newest_step(folder))
            continue
        num_ends += 1
        different += differences(expected, load_checkpoint_folder(folder / "ends")["ends"])
    return {
        "kills": num_kills,
        "ends_compared": num_ends,
        "tensors_compared": sum(isinstance(value, torch.Tensor) for value in expected.values()),
        "logged_numbers_compared": sum(not isinstance(value, torch.Tensor) for value in expected.values()),
        "seconds_undisturbed": round(duration, 2),
        "newest_step_at_kill": steps,
        "different": sorted(set(different)),
    }


def newest_step(folder: Path) -> int | None:
    """Optimiser steps of the newest checkpoint below a folder; None where there is none."""
    newest = newest_checkpoint(folder)
    return None if newest is None else (peek_folder(newest) or {}).get("global_step")


def differences(expected: Ends, found: Ends) -> list[str]:
    """Names whose values are not the same, bit for bit, or that only one side has."""
    names = []
    for name in {**expected, **found}:
        a, b = expected.get(name), found.get(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = a.dtype == b.dtype and torch.equal(a, b)
        else:
            same = a is not None and a == b
        if not same:
            names.append(name)
    return names


def kill_saves(place: Path, *, kills: int, num_items: int = 2_000_000, seed: int = 0) -> dict[str, Any]:
    """Kills a child that writes one checkpoint after another into the same folder, and reads it each time.

    Args:
        place: an empty folder.
        kills: how often to kill.
        num_items: float32 numbers in each checkpoint.
        seed: of the moments.

    Returns:
        figures for a record: ``unreadable`` and ``inconsistent`` count what must not be.
    """
    moments, folder = random.Random(seed), place / "last.ckpt"
    save_checkpoint_folder(folder, version(0, num_items))
    begin = time.monotonic()
    save_checkpoint_folder(folder, version(0, num_items))
    duration = time.monotonic() - begin
    unreadable, inconsistent, versions, leftovers = [], 0, [0], 0
    for _ in range(kills):

        def save_for_ever(number: int = versions[-1]) -> None:
            while True:
                number += 1
                save_checkpoint_folder(folder, version(number, num_items))

        killed_or_done(in_child(save_for_ever, place / "output.txt"), moments.uniform(0.0, 3 * duration))
        leftovers += len(list(folder.iterdir())) > 3
        try:
            loaded = load_checkpoint_folder(folder)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        number = loaded["global_step"]
        versions.append(number)
        whole = torch.equal(loaded["weights"], torch.full((num_items,), float(number)))
        inconsistent += not whole or loaded["again"] is not loaded["weights"] or loaded["text"] != str(number)
        inconsistent += number < versions[-2]
    return {
        "kills": kills,
        "megabytes": round(4e-6 * num_items, 1),
        "seconds_of_a_save": round(duration, 3),
        "versions_written": versions[-1],
        "kills_that_left_parts_beside_it": leftovers,
        "unreadable": unreadable,
        "inconsistent": inconsistent,
    }


def version(number: int, num_items: int) -> dict[str, Any]:
    """A checkpoint all of whose content says its number."""
    weights = torch.full((num_items,), float(number))
    return {"global_step": number, "weights": weights, "again": weights, "text": str(number)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 when nothing was lost."""
    options_parser = common.parser("Runs that are killed at random moments.")
    options_parser.add_argument("--kills", type=int, help="kills of each case (default: 50, with --quick 3)")
    options_parser.add_argument("--only", action="append", choices=[*CASES, "saves"], help="one of the cases")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads or 1)  # a child inherits no threads
    kills = options.kills or (3 if options.quick else 50)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or [*CASES, "saves"]:
            place = Path(folder, re.sub(r"\W+", "_", name))
            place.mkdir()
            if name == "saves":
                results[name] = kill_saves(place, kills=kills)
            else:
                results[name] = kill_case(CASES[name], place, kills=kills)
            print(f"{name}: {results[name]}", flush=True)
    common.save(options, "kills", {"kills": kills, "run": RUN, "conversions": RECIPES}, results)
    lost = [
        name
        for name, found in results.items()
        if found.get("different") or found.get("unreadable") or found.get("inconsistent")
    ]
    print(f"lost something: {', '.join(lost)}" if lost else "nothing was lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
