"""Recall out of the reach of the window: what the memory of AllMem adds, and what of it matters.

    python benchmarks/past_window.py                          every variant, three seeds
    python benchmarks/past_window.py --only linear            one variant (and the window alone)
    python benchmarks/past_window.py --quick                  to try the script

Two blocks of width 64 without MLP: a short convolution, then AllMem with a window and chunks of 16 tokens.
Needles lie in the first half of the text, the questions stand at its end, so the window sees none of the
evidence: alone it can only guess (1 of 16 values). Every model is trained on fresh examples and tested on
examples that no training has seen; again with its memory switched off, and with other windows and chunks than
in training. A run that is done is kept in `runs/past_window`, so that a run that was stopped goes on with the
next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import points
import torch
from lightning.pytorch import seed_everything

from memzoo.models.config import ModelConfig
from memzoo.models.conversion import memory_off
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.task_module import TaskDataModule
from memzoo.train.data.tasks import make_task
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig
from memzoo.train.task_evaluation import recall_on_task

NAME = "past_window"
WORK = Path("runs") / NAME
D_MODEL, VOCAB = 64, 66
BASELINE = "window"
WINDOW: dict[str, Any] = {"type": "sliding_window", "num_heads": 2, "window_size": 16, "rope_theta": None}
ALLMEM: dict[str, Any] = {
    **WINDOW,
    "type": "allmem",
    "mem_dim": 64,
    "chunk_size": 16,
    "lr_init": 0.05,
    "recompute": False,
}
SMALL = {**ALLMEM, "mem_dim": 16}
# windows and chunks of the tests, beside those of the training
OTHER_SIZES = ((8, 8), (32, 32), (32, 16), (16, 32))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mixer and what it is trained on.

    Attributes:
        mixer: its config.
        num_queries: needles, and questions.
        length: tokens of an example.
        sizes: sizes drawn anew in every step.
    """

    mixer: Mapping[str, Any] = field(default_factory=lambda: dict(ALLMEM))
    num_queries: int = 4
    length: int = 64
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def task(self) -> dict[str, Any]:
        """The needles, without their length."""
        return {"type": "needle", "num_queries": self.num_queries, "depth": [0.0, 0.5]}


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(mixer=WINDOW),
    "allmem": Variant(),
    "linear": Variant(mixer={**ALLMEM, "net": "linear"}),
    "mlp": Variant(mixer={**ALLMEM, "net": "mlp"}),
    "without momentum": Variant(mixer={**ALLMEM, "momentum": False}),
    "muon": Variant(mixer={**ALLMEM, "muon": True}),
    "norm post": Variant(mixer={**ALLMEM, "fast_norm": "post"}),
    "norm pre": Variant(mixer={**ALLMEM, "fast_norm": "pre"}),
    "norm none": Variant(mixer={**ALLMEM, "fast_norm": "none"}),
    "chunk 8": Variant(mixer={**ALLMEM, "chunk_size": 8}),
    "chunk 32": Variant(mixer={**ALLMEM, "chunk_size": 32}),
    "random sizes": Variant(sizes={"window_size": (4, 32), "chunk_size": (4, 32)}),
    **{
        f"{net}, width 16, {count} needles": Variant(
            mixer={**SMALL, "net": net}, num_queries=count, length=32 + 8 * count
        )
        for net in ("linear", "swiglu")
        for count in (4, 8, 12)
    },
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How every model is trained and tested.

    Attributes:
        steps, batch_size, rate: of the training.
        num_tests: examples of a test.
    """

    steps: int = 600
    batch_size: int = 64
    rate: float = 0.003
    num_tests: int = 500


def trained(variant: Variant, seed: int, training: Training, device: str) -> dict[str, Any]:
    """Trains one model; accuracy on the test, with the memory off, and with other sizes."""
    seed_everything(seed, verbose=False)
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        layers=[{"type": "base_conv", "conv_size": 3}, dict(variant.mixer)],
        norm="layer",
        initializer_range=0.125,
        tie_embeddings=True,
    )
    optimizer = OptimizerConfig(
        lr=training.rate, weight_decay=0.1, warmup_steps=training.steps // 10, min_lr_ratio=0.0
    )
    module = LanguageModelModule(
        config, optimizer, mixer_init_scale=1.0, sizes={name: tuple(s) for name, s in variant.sizes.items()}
    )
    data = TaskDataModule(
        variant.task,
        train_lengths=[variant.length],
        batch_size=training.batch_size,
        num_batches=training.steps,
        seed=seed,
    )
    seconds = points.fit(module, data, device)
    model = module.model.to(device).eval()
    recall = partial(_recall, variant=variant, training=training)
    found = {"seconds": seconds, "accuracy": recall(model)}
    if variant.mixer["type"] == "allmem":
        found["memory_off"] = recall(model, is_off=True)
        found["other_sizes"] = {
            f"window {window}, chunk {chunk}": recall(_resized(model, window, chunk))
            for window, chunk in OTHER_SIZES
        }
    return found


def _recall(model: MemoryLM, *, variant: Variant, training: Training, is_off: bool = False) -> float:
    task = make_task(variant.task, seq_len=variant.length)
    with memory_off(model) if is_off else nullcontext():
        found = recall_on_task(model, task, [variant.length], num_examples=training.num_tests)
    return float(found["lengths"][0]["accuracy"])


def _resized(model: MemoryLM, window_size: int, chunk_size: int) -> MemoryLM:
    """The same weights with another window and other chunks."""
    layers = [mixer.to_dict() for mixer in model.config.mixers]
    layers[-1] |= {"window_size": window_size, "chunk_size": chunk_size}
    other = MemoryLM(ModelConfig.from_dict({**model.config.to_dict(), "layers": layers}))
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).device).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing, writes the record after every run, prints a table."""
    options_of = common.parser("Recall out of the reach of the window.")
    options_of.add_argument("--only", action="append", choices=list(VARIANTS), help="may be repeated")
    options_of.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: %(default)s)")
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    options = options_of.parse_args(arguments)
    common.prepare(options)
    points.be_quiet()
    training = Training(steps=2, batch_size=2, num_tests=4) if options.quick else Training()
    chosen = [name for name in VARIANTS if not options.only or name in (BASELINE, *options.only)]
    asked = [(name, seed) for name in chosen for seed in range(1 if options.quick else options.seeds)]
    described = {
        "training": asdict(training),
        "variants": {name: asdict(VARIANTS[name]) for name in chosen},
        "threads": torch.get_num_threads(),
        "device": str(options.device),
    }
    done: list[dict[str, Any]] = []
    for index, (name, seed) in enumerate(asked, start=1):
        variant = VARIANTS[name]
        settings = {"variant": asdict(variant), "training": asdict(training), "seed": seed}
        file = name.replace(" ", "_").replace(",", "")
        make = partial(trained, variant, seed, training, str(options.device))
        done.append({"variant": name, "seed": seed, **points.kept(options.work, file, settings, make)})
        off = done[-1].get("memory_off")
        print(
            f"[{index}/{len(asked)}] {name}, seed {seed}: {done[-1]['accuracy']:.3f}"
            f"{'' if off is None else f', memory off {off:.3f}'}, {done[-1]['seconds']:.0f} s",
            flush=True,
        )
        common.save(options, NAME, described, {"chance": 1 / 16, "runs": done})
    rows = [(run["variant"], run["seed"], run["accuracy"], run.get("memory_off", "")) for run in done]
    print(common.table(rows, ("variant", "seed", "accuracy", "memory off")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
