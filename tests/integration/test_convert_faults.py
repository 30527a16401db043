"""Conversions that meet something bad: numbers that are not finite, damaged folders, two at once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.conversion.modules import DistillModule
from memzoo.train.conversion.recipe import ConversionRecipe
from memzoo.train.conversion.run import Comparison, convert_and_compare
from memzoo.train.conversion.stage import StageSettings
from memzoo.train.conversion.workshop import Conversion

SIZES = {"seq_len": 24, "batch_size": 2}
ALIGN = {"name": "align", "loss": {"mixer_out": 1.0}, "train": "new", "steps": 2, "lr": 0.01, **SIZES}
TUNE = {
    "name": "tune",
    "loss": {"kl": 1.0},
    "train": "lora",
    "steps": 3,
    "lr": 0.003,
    "lora_rank": 2,
    "new_lr_scale": 3.0,
    **SIZES,
}
TARGET = {"type": "lolcats", "window_size": 6, "num_sinks": 2, "feature_dim": 3}
SETTINGS = StageSettings(progress=False, accelerator="cpu", save_seconds=0.0)


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


@pytest.fixture
def book(tmp_path: Path) -> Path:
    text = tmp_path / "book.txt"
    words = random.Random(0).choices(["the", "brown", "fox", "over", "a", "dog", "."], k=1000)
    text.write_text(" ".join(words), encoding="utf-8")
    return text


def convert(
    folder: Path, book: Path, stages: list[dict[str, Any]], *, source: MemoryLM | None = None, **options: Any
) -> Mapping[str, Conversion]:
    recipe = ConversionRecipe(target=TARGET, stages=stages, data={"files": [str(book)]}, seed=5)
    return convert_and_compare(
        source or teacher(),
        "bytes",
        recipe,
        folder,
        tokens={},
        comparison=Comparison(control=False),
        settings=options.pop("settings", SETTINGS),
        **options,
    )[1]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"lr": 1e30, "train": "mixers"}, r"hybrid: align, step 2: the loss layer_0 is \w+, .*It begins in"),
        ({**TUNE, "lr": 1e30, "train": "all"}, r"hybrid: tune, step 2: .* not a finite number. It begins in"),
        (
            {**TUNE, "lr": 1e30},
            "hybrid: tune, step 2: the loss kl is nan.* in the output of layer 0 of the model",
        ),
    ],
)
def test_a_run_whose_numbers_are_not_finite_stops_and_keeps_nothing(
    tmp_path: Path, book: Path, stage: dict[str, Any], message: str
) -> None:
    wrong = {**ALIGN, "steps": 4, **stage}
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", book, [wrong])
    kept = [path.name for path in (tmp_path / "out" / "work" / "stages").iterdir()]
    assert kept in ([], [f"hybrid-1-{wrong['name']}.running"])


def test_a_last_step_that_breaks_the_weights_is_not_kept(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(self: DistillModule, *given: Any) -> None:
        next(part for part in self.parameters() if part.requires_grad).data.fill_(torch.inf)

    monkeypatch.setattr(DistillModule, "on_train_batch_end", breaking)
    with pytest.raises(ValueError, match=r"the weight layers\.0\..* is nan, not a finite number"):
        convert(tmp_path / "out", book, [{**TUNE, "steps": 1}])
    assert not (tmp_path / "out" / "work" / "stages" / "hybrid-1-tune").exists()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_source_that_is_not_finite_is_refused_by_its_layer(tmp_path: Path, book: Path, layer: int) -> None:
    source = teacher()
    with torch.no_grad():
        source.blocks[layer].mixer.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=rf"begin in the weight layers\.{layer}\.mixer\.q_proj\.weight of the source"
    ):
        convert(tmp_path / "out", book, [ALIGN], source=source)
    with torch.no_grad():
        source.blocks[layer].mixer.q_proj.weight[0, 0] = 0.0
        source.blocks[layer].mlp.up_proj.weight.fill_(3e38)
        source.blocks[layer].mlp.gate_proj.weight.fill_(3e38)
    with pytest.raises(ValueError, match=rf"begin in the output of layer {layer} of the source"):
        convert(tmp_path / "other", book, [ALIGN], source=source)
