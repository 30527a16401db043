"""What the stored tokens of B'MOJO are worth: recall by the size of the store and by length.

    python benchmarks/eidetic_recall.py                          every variant, three seeds
    python benchmarks/eidetic_recall.py --only "bmojo"           one variant (and full attention)
    python benchmarks/eidetic_recall.py --quick                  to try the script

Two blocks of width 64 without MLP: a short convolution, then the mixer. MQAR with its pairs in front, a
constant filler, and nearly all questions late (`power_a` 8), so that neither a window of 8 tokens nor the 8
fading tokens behind it hold an answer. Every model is trained on the same fresh examples, first few pairs in
short ones, and tested on examples that no training has seen: at the length of the training and up to eight
times of it. B'MOJO is trained with one size of the store and tested with several.
A run that is done is kept in `runs/eidetic_recall`, so that a run that was stopped goes on with the next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import points
import torch
from lightning.pytorch import seed_everything

from memzoo.layers import probe
from memzoo.layers.bmojo import BMojoMixer
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.mqar import MQARConfig, mqar
from memzoo.train.data.mqar_module import MQARDataModule, MQARSegment
from memzoo.train.evaluate import recall_on_mqar
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig

NAME = "eidetic_recall"
WORK = Path("runs") / NAME
TEST_SEED = 2**32 - 1
D_MODEL, WINDOW = 64, 8
BASELINE = "attention"
STORE_SIZES = (0, 4, 8, 16, 32)
MAMBA: dict[str, Any] = {"type": "mamba2", "d_state": 16, "head_dim": 16, "rate_range": (0.01, 0.1)}
BMOJO: dict[str, Any] = {
    "type": "bmojo",
    "num_heads": 2,
    "window_size": WINDOW,
    "eidetic_size": 16,
    "mixers": [{**MAMBA, "expand": 1}],
}
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {"type": "attention", "num_heads": 2},
    "attention without positions": {"type": "attention", "num_heads": 2, "rope_theta": None},
    "window": {"type": "sliding_window", "num_heads": 2, "window_size": WINDOW},
    "mamba2": MAMBA,
    "bmojo_f": {**BMOJO, "eidetic_size": 0},
    "bmojo": BMOJO,
    "bmojo at a fixed distance": {**BMOJO, "eidetic_rope": "fixed"},
    "bmojo without positions": {**BMOJO, "rope_theta": None},
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The task and its training.

    Attributes:
        vocab_size: tokens of the task, above the longest example.
        segments: (tokens of an example, pairs, steps) of each part of the training; the last is the task.
        batch_size, rate: of the training.
        power_a: how late the questions are.
        factors: lengths of the tests, in lengths of the task.
        num_tests: examples of a test.
    """

    vocab_size: int = 520
    segments: tuple[tuple[int, int, int], ...] = ((32, 4, 300), (64, 8, 900))
    batch_size: int = 64
    rate: float = 0.005
    power_a: float = 8.0
    factors: tuple[int, ...] = (1, 2, 4, 8)
    num_tests: int = 500

    @property
    def task(self) -> tuple[int, int]:
        """Tokens and pairs of a test example."""
        return self.segments[-1][:2]


QUICK = Sizes(vocab_size=70, segments=((16, 2, 2), (32, 4, 2)), batch_size=4, factors=(1, 2), num_tests=4)


def trained(mixer: Mapping[str, Any], seed: int, sizes: Sizes, device: str) -> dict[str, Any]:
    """Trains one model; its recall by length, and by the size of its store."""
    seed_everything(seed, verbose=False)
    config = ModelConfig(
        vocab_size=sizes.vocab_size,
        d_model=D_MODEL,
        layers=[{"type": "base_conv", "conv_size": 3}, dict(mixer)],
        norm="layer",
        initializer_range=0.125,
        tie_embeddings=True,
    )
    steps = sum(count for _, _, count in sizes.segments)
    optimizer = OptimizerConfig(lr=sizes.rate, weight_decay=0.1, warmup_steps=steps // 10, min_lr_ratio=0.0)
    module = LanguageModelModule(config, optimizer, mixer_init_scale=1.0)
    data = MQARDataModule(
        vocab_size=sizes.vocab_size,
        train_segments=[
            MQARSegment(input_seq_len=length, num_kv_pairs=pairs, num_examples=count * sizes.batch_size)
            for length, pairs, count in sizes.segments
        ],
        batch_size=sizes.batch_size,
        power_a=sizes.power_a,
        seed=seed,
    )
    seconds = points.fit(module, data, device)
    model = module.model.to(device).eval()
    found: dict[str, Any] = {"seconds": seconds, "by_length": _by_length(model, sizes)}
    memory = model.blocks[-1].mixer
    if isinstance(memory, BMojoMixer) and memory.config.has_store:
        found["by_size"] = {}
        for size in STORE_SIZES:
            memory.set_eidetic_size(size)
            found["by_size"][str(size)] = _by_length(model, sizes)
        memory.set_eidetic_size(int(mixer["eidetic_size"]))
        found["pairs_stored"] = _pairs_stored(model, sizes)
    return found


def _by_length(model: MemoryLM, sizes: Sizes) -> dict[str, float]:
    """Accuracy at each length of the test."""
    tests = {factor * sizes.task[0]: _examples(sizes, factor) for factor in sizes.factors}
    return {str(length): recall_on_mqar(model, test)["accuracy"] for length, test in tests.items()}


def _pairs_stored(model: MemoryLM, sizes: Sizes) -> float:
    """Share of the tokens of pairs that are in the store when the last chunk of a test example begins."""
    inputs, _ = mqar(_examples(sizes, 1))
    with torch.no_grad(), probe() as seen:
        model(inputs.to(model.embed_tokens.weight.device))
    stored = seen["stored_positions"][-1][:, -1]
    num_pairs = sizes.task[1]
    return float(((stored >= 0) & (stored < 2 * num_pairs)).sum(1).double().mean() / (2 * num_pairs))


def _examples(sizes: Sizes, factor: int) -> MQARConfig:
    length, pairs = sizes.task
    return MQARConfig(
        vocab_size=sizes.vocab_size,
        input_seq_len=factor * length,
        num_kv_pairs=pairs,
        num_examples=sizes.num_tests,
        power_a=sizes.power_a,
        seed=TEST_SEED,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing, writes the record after every run, prints a table."""
    options_of = common.parser("Recall of B'MOJO by the size of its store and by length.")
    options_of.add_argument("--only", action="append", choices=list(VARIANTS), help="may be repeated")
    options_of.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: %(default)s)")
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    options = options_of.parse_args(arguments)
    common.prepare(options)
    points.be_quiet()
    sizes = QUICK if options.quick else Sizes()
    chosen = [name for name in VARIANTS if not options.only or name in (BASELINE, *options.only)]
    asked = [(name, seed) for seed in range(1 if options.quick else options.seeds) for name in chosen]
    described = {
        "sizes": asdict(sizes),
        "variants": {name: VARIANTS[name] for name in chosen},
        "threads": torch.get_num_threads(),
        "device": str(options.device),
    }
    done: list[dict[str, Any]] = []
    for index, (name, seed) in enumerate(asked, start=1):
        settings = {"mixer": VARIANTS[name], "sizes": asdict(sizes), "seed": seed}
        make = partial(trained, VARIANTS[name], seed, sizes, str(options.device))
        done.append(
            {
                "variant": name,
                "seed": seed,
                **points.kept(options.work, name.replace(" ", "_"), settings, make),
            }
        )
        print(
            f"[{index}/{len(asked)}] {name}, seed {seed}: {_line(done[-1]['by_length'])}, "
            f"{done[-1]['seconds']:.0f} s",
            flush=True,
        )
        common.save(options, NAME, described, {"runs": done})
    rows = [(run["variant"], run["seed"], _line(run["by_length"])) for run in done]
    for run in done:
        for size, found in run.get("by_size", {}).items():
            rows.append((f"{run['variant']}, {size} stored", run["seed"], _line(found)))
    print(common.table(rows, ("variant", "seed", "accuracy by length")))
    return 0


def _line(by_length: Mapping[str, float]) -> str:
    return ", ".join(f"{length}: {accuracy:.3f}" for length, accuracy in by_length.items())


if __name__ == "__main__":
    sys.exit(main())
