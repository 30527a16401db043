"""Recall against the size of the state: MQAR with mixers whose memory grows step by step.

    python benchmarks/recall_frontier.py                       every mixer, three seeds
    python benchmarks/recall_frontier.py --only based          one mixer (and full attention)
    python benchmarks/recall_frontier.py --quick               to try the script

The model of the BASED paper's study (arXiv 2402.18668, figure 2): two blocks without MLP, a short
convolution and the mixer, width 64. Every point is trained on the same fresh examples, first few pairs in
short examples, then more (without that the gated mixers have learned nothing after 400 steps). With several
`--rates` the better one by its validation counts. The test is 1,000 examples that no training has seen.
A point that is done is kept in `runs/recall_frontier`, so that a run that was stopped goes on with the next.

`mamba2_slow` is Mamba-2 that begins with slower decays (`rate_range`): the published ones forget within a few
tokens, and a training as short as this one does not undo that; one point with them is there to show it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import points
import torch
from lightning.pytorch import seed_everything

from memzoo.layers import build_mixer
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.mqar import MQARConfig
from memzoo.train.data.mqar_module import MQARDataModule, MQARSegment
from memzoo.train.evaluate import recall_on_mqar
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig

NAME = "recall_frontier"
WORK = Path("runs") / NAME
TEST_SEED = 2**32 - 1
D_MODEL = 64
RATES = (0.005,)
BASELINE = "attention"
SLOW = (0.01, 0.1)  # initial decay rates of Mamba-2
# curve (the mixer, unless settings name its type) -> settings in order of the size of their state
POINTS: dict[str, list[dict[str, Any]]] = {
    BASELINE: [{"num_heads": 1}],
    "sliding_window": [{"num_heads": 1, "window_size": size} for size in (8, 16, 32)],
    "based": [{"num_heads": 1, "feature_dim": size} for size in (2, 4, 8)],
    "gla": [{"num_heads": 1, "head_dim": size, "value_dim": D_MODEL} for size in (4, 8, 16, 32)],
    "gated_delta_net": [{"num_heads": 1, "head_dim": size, "value_dim": D_MODEL} for size in (4, 8, 16, 32)],
    "mamba2": [{"d_state": 16}],
    "mamba2_slow": [{"type": "mamba2", "d_state": size, "rate_range": SLOW} for size in (4, 8, 16)],
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The task and its training.

    Attributes:
        vocab_size: tokens of the task.
        segments: (tokens of an example, pairs, steps) of each part of the training; the last is the task.
        batch_size: examples of a step.
        num_tests: examples of a test.
    """

    vocab_size: int = 128
    segments: tuple[tuple[int, int, int], ...] = ((32, 4, 300), (64, 8, 200), (64, 16, 400))
    batch_size: int = 64
    num_tests: int = 1000

    @property
    def steps(self) -> int:
        """Of a whole training."""
        return sum(steps for _, _, steps in self.segments)

    @property
    def task(self) -> tuple[int, int]:
        """Tokens and pairs of a test example."""
        return self.segments[-1][:2]


QUICK = Sizes(vocab_size=64, segments=((16, 2, 2), (32, 4, 2)), batch_size=4, num_tests=20)


def model_config(mixer: str, settings: Mapping[str, Any], sizes: Sizes) -> ModelConfig:
    """Short convolution, then the mixer; no MLP."""
    return ModelConfig(
        vocab_size=sizes.vocab_size,
        d_model=D_MODEL,
        layers=[{"type": "base_conv", "conv_size": 3}, {"type": mixer, **settings}],
        norm="layer",
        initializer_range=0.125,
        tie_embeddings=True,
    )


def train_once(config: ModelConfig, rate: float, seed: int, sizes: Sizes, device: str) -> dict[str, Any]:
    """Train one model; accuracy on validation and test examples."""
    seed_everything(seed, verbose=False)
    optimizer = OptimizerConfig(lr=rate, weight_decay=0.1, warmup_steps=sizes.steps // 10, min_lr_ratio=0.0)
    module = LanguageModelModule(config, optimizer, mixer_init_scale=1.0)
    segments = [
        MQARSegment(input_seq_len=length, num_kv_pairs=pairs, num_examples=steps * sizes.batch_size)
        for length, pairs, steps in sizes.segments
    ]
    data = MQARDataModule(
        vocab_size=sizes.vocab_size, train_segments=segments, batch_size=sizes.batch_size, seed=seed
    )
    seconds = points.fit(module, data, device)
    model = module.model.to(device).eval()
    accuracy = {
        split: recall_on_mqar(model, _examples(sizes, number))["accuracy"]
        for split, number in (("validation", TEST_SEED - 1), ("test", TEST_SEED))
    }
    return {"rate": rate, "seconds": seconds, **accuracy}


def _examples(sizes: Sizes, seed: int) -> MQARConfig:
    length, pairs = sizes.task
    return MQARConfig(
        vocab_size=sizes.vocab_size,
        input_seq_len=length,
        num_kv_pairs=pairs,
        num_examples=sizes.num_tests,
        seed=seed,
    )


def point(mixer: str, settings: Mapping[str, Any], seed: int, sizes: Sizes, options: Any) -> dict[str, Any]:
    """One point of the frontier, from its file where it has been done."""
    config = model_config(mixer, settings, sizes)
    asked = {"config": config.to_dict(), "sizes": asdict(sizes), "rates": options.rates, "seed": seed}
    return points.kept(
        options.work, mixer, asked, lambda: _trained(mixer, settings, seed, sizes, config, options)
    )


def _trained(
    mixer: str, settings: Mapping[str, Any], seed: int, sizes: Sizes, config: ModelConfig, options: Any
) -> dict[str, Any]:
    runs = [train_once(config, rate, seed, sizes, str(options.device)) for rate in options.rates]
    best = max(runs, key=lambda run: run["validation"])
    with torch.device("meta"):
        num_parameters = MemoryLM(config).num_parameters()
        memory = build_mixer({"type": mixer, **settings, "d_model": D_MODEL})
    return {
        "mixer": mixer,
        "settings": dict(settings),
        "seed": seed,
        "state_bytes": memory.state_num_bytes(sizes.task[0]),
        "parameters": num_parameters,
        "accuracy": best["test"],
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, write the record after every point, print a table."""
    options_of = common.parser("Recall against the size of the state.")
    options_of.add_argument(
        "--only", action="append", choices=list(POINTS), help="this mixer (may be repeated)"
    )
    options_of.add_argument("--seeds", type=int, default=3, help="seeds per point (default: %(default)s)")
    options_of.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try")
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of finished points")
    options = options_of.parse_args(arguments)
    options.rates = list(options.rates)
    common.prepare(options)
    points.be_quiet()
    sizes = QUICK if options.quick else Sizes()
    chosen = [name for name in POINTS if not options.only or name in (BASELINE, *options.only)]
    asked = [
        (name, settings, seed)
        for name in chosen
        for settings in (POINTS[name][:1] if options.quick else POINTS[name])
        for seed in range(1 if options.quick else options.seeds)
    ]
    described = {
        "sizes": asdict(sizes),
        "rates": options.rates,
        "points": {name: POINTS[name] for name in chosen},
        "threads": torch.get_num_threads(),
        "device": str(options.device),
    }
    done: list[dict[str, Any]] = []
    for index, (name, settings, seed) in enumerate(asked, start=1):
        done.append(point(name, settings, seed, sizes, options))
        found = done[-1]
        spent = sum(run["seconds"] for run in found["runs"])
        print(
            f"[{index}/{len(asked)}] {name} {settings}, seed {seed}: {found['accuracy']:.3f} with "
            f"{found['state_bytes']:,} bytes, {spent:.0f} s",
            flush=True,
        )
        common.save(options, NAME, described, {"points": done})
    rows = [
        (f"{found['mixer']} {found['settings']}", found["seed"], found["state_bytes"], found["accuracy"])
        for found in done
    ]
    print(common.table(rows, ("mixer", "seed", "state bytes", "accuracy")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
