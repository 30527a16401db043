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
from memzoo.train.conversion.comparison import Row
from memzoo.train.conversion.modules import DistillModule
from memzoo.train.conversion.recipe import ConversionRecipe
from memzoo.train.conversion.run import Comparison, convert_and_compare
from memzoo.train.conversion.stage import StageSettings
from memzoo.train.conversion.workshop import Conversion
from memzoo.train.data.batches import TokenBatch

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


def weights_of(found: Mapping[str, Conversion]) -> dict[str, torch.Tensor]:
    return found["hybrid"].model.state_dict()


def test_what_is_damaged_in_the_folder_is_done_again(tmp_path: Path, book: Path) -> None:
    def run() -> tuple[list[Row], dict[str, Conversion]]:
        recipe = ConversionRecipe(target=TARGET, stages=[ALIGN, TUNE], layers={"method": "mse", "keep": 1},
            data={"files": [str(book)]})  # fmt: skip
        tokens = {"book": torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(1))}
        sizes = Comparison(control=False, num_windows=2, window_size=48, first_token=0)
        return convert_and_compare(
            teacher(), "bytes", recipe, tmp_path / "out", tokens=tokens, comparison=sizes, settings=SETTINGS
        )

    rows, found = run()
    expected = {row.name: row.losses["book"].losses for row in rows}
    files = [path for path in sorted((tmp_path / "out" / "work").rglob("*")) if path.is_file()]
    kinds = {(path.parent.parent.name, path.name) for path in files}
    assert len(kinds) > 8
    for damage in ("cut", "changed"):
        for path in files:
            content = bytearray(path.read_bytes())
            content[-20] ^= 1
            path.write_bytes(bytes(content[: len(content) // 2]) if damage == "cut" else bytes(content))
        rows, again = run()
        for name, tensor in weights_of(found).items():
            assert torch.equal(weights_of(again)[name], tensor), (damage, name)
        for row in rows:
            assert torch.equal(row.losses["book"].losses, expected[row.name]), (damage, row.name)


def test_a_damaged_checkpoint_inside_a_stage_starts_the_stage_anew(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(tmp_path / "whole", book, [TUNE])
    step = DistillModule.training_step

    def stopping(self: DistillModule, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DistillModule, "training_step", stopping)
        with pytest.raises(RuntimeError, match="power cut"):
            convert(tmp_path / "out", book, [TUNE])
    (saved,) = (tmp_path / "out" / "work" / "stages").glob("*.running/*/tensors.safetensors")
    saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    again = convert(tmp_path / "out", book, [TUNE])
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], tensor), name
    assert again["hybrid"].stages[0].history == whole["hybrid"].stages[0].history


def test_another_text_under_the_same_name_is_not_gone_on_with(tmp_path: Path, book: Path) -> None:
    convert(tmp_path / "out", book, [ALIGN])
    book.write_text(book.read_text().replace("fox", "cat"))
    with pytest.raises(ValueError, match=r"beginning of another conversion \(other text"):
        convert(tmp_path / "out", book, [ALIGN])


def test_what_no_stage_trains_keeps_the_bits_of_the_source(tmp_path: Path, book: Path) -> None:
    source = teacher()
    narrow = {**TUNE, "lora_targets": ["v_proj"]}
    for stages in (
        [ALIGN],
        [ALIGN, narrow],
        [{**TUNE, "train": "mixers"}],
        [{**TUNE, "train": "all", "steps": 0}],
    ):
        found = weights_of(
            convert(tmp_path / str(len(list(tmp_path.iterdir()))), book, stages, source=source)
        )
        for name, tensor in source.state_dict().items():
            trained = (
                "v_proj" in name if narrow in stages else stages[0]["train"] == "mixers" and ".mixer." in name
            )
            assert torch.equal(found[name], tensor) is not trained, (stages, name)


@pytest.mark.parametrize(
    "first", [{"type": "lolcats", "window_size": 4, "feature_dim": 3}, {"type": "linear_attention"}]
)
def test_a_hybrid_can_be_converted_again(tmp_path: Path, book: Path, first: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = {"num_heads": 2, "num_kv_heads": 1}
    config = ModelConfig(
        vocab_size=257, d_model=16, layers=[{**first, **heads}, {"type": "attention", **heads}], num_layers=2,
        mlp={"type": "swiglu", "d_ff": 24}, tie_embeddings=True,
    )  # fmt: skip
    source = MemoryLM(config).eval()
    found = convert(tmp_path / "out", book, [ALIGN], source=source)["hybrid"]
    assert [mixer.type for mixer in found.model.config.mixers] == ["lolcats", "lolcats"]
    assert all(check.passed for check in found.report.checks)


def test_stages_of_similar_names_have_rows_of_their_own(tmp_path: Path, book: Path) -> None:
    names = ("a-b", "a_b", "A-B", "end")
    stages = [{**ALIGN, "name": name, "lr": 0.3} for name in names]
    rows, _ = convert_and_compare(
        teacher(),
        "bytes",
        ConversionRecipe(target={**TARGET, "window_size": 2}, stages=stages, data={"files": [str(book)]}),
        tmp_path / "out",
        tokens={"book": torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(1))},
        comparison=Comparison(control=False, ablations=True, num_windows=2, window_size=48, first_token=0),
        settings=SETTINGS,
    )
    losses = {row.name: row.losses["book"].losses for row in rows if row.name.startswith("hybrid after")}
    assert len(losses) == 3
    assert not any(torch.equal(losses[a], losses[b]) for a in losses for b in losses if a < b)
