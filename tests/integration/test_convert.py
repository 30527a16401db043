"""The conversion command from end to end, on a model of two small layers."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import memzoo
import memzoo.models.hf
from memzoo import configs
from memzoo.cli import main
from memzoo.models.checkpoints import folder as folder_reader
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import ConversionPlan, convert_mixers, gate_weights, load_gates, memory_off
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.train.conversion.comparison import Row, comparison_results, comparison_table
from memzoo.train.conversion.modules import AlignmentModule, DistillModule
from memzoo.train.conversion.recipe import (
    ConversionRecipe,
    check_recipe,
    control_plan,
    read_recipe,
    with_steps,
)
from memzoo.train.conversion.recipe_stage import Stage
from memzoo.train.conversion.run import Comparison, convert_and_compare
from memzoo.train.conversion.stage import StageSettings
from memzoo.train.conversion.workshop import Conversion, Workshop
from memzoo.train.data.texts import load_text
from memzoo.train.data.tokenizers import load_tokenizer

RECIPE = """
target: {type: lolcats, window_size: 16, num_sinks: 2, feature_dim: 4}
stages:
  - {name: align, loss: {mixer_out: 1.0}, train: new, steps: 3, lr: 0.01, seq_len: 48}
  - {name: tune, loss: {kl: 1}, train: lora, steps: 3, lr: 0.001, seq_len: 48, lora_rank: 2, new_lr_scale: 10}
"""
ALIGN = {"name": "align", "loss": {"mixer_out": 1.0}, "train": "new", "steps": 2, "lr": 0.01, "seq_len": 24}
TUNE = {
    "name": "tune",
    "loss": {"kl": 1.0},
    "train": "lora",
    "steps": 3,
    "lr": 0.001,
    "seq_len": 24,
    "lora_rank": 1,
    "new_lr_scale": 10.0,
}
TARGET = {"type": "lolcats", "window_size": 8, "num_sinks": 1, "feature_dim": 4}
QUIET = StageSettings(progress=False, accelerator="cpu")


def convert(source: Path, folder: Path, recipe: ConversionRecipe, **options: object) -> dict[str, Conversion]:
    """Trains on a few sentences, without measuring on books."""
    text = source / "text.txt"
    several = " ".join(document.text for document in load_text("state_of_the_union")[:20])
    text.write_text(several[:30_000], encoding="utf-8")
    recipe = replace(recipe, data={"files": str(text)})
    return convert_and_compare(
        memzoo.load(source), str(source), recipe, folder, tokens={}, settings=QUIET, **options
    )[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level teacher with its tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        layers={"type": "attention"},
        num_layers=2,
        mixer_defaults={"num_heads": 2, "num_kv_heads": 1},
        mlp={"type": "swiglu", "d_ff": 24},
        tie_embeddings=True,
    )
    save_model(MemoryLM(config), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted")
    recipe = output / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    arguments = ["--source", str(source), "--output", str(output), "--recipe", str(recipe)]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        arguments += ["--num_windows", "2", "--accelerator", "cpu", "--ablations", "true"]
        assert main(["convert", *arguments]) == 0
    assert shown.getvalue().splitlines()[-2:] == [
        f"page written to {output / 'index.html'}",
        f"model written to {output / 'hybrid'}",
    ]
    return output


def test_writes_both_models_and_a_report(converted: Path) -> None:
    record = json.loads((converted / "report.json").read_text(encoding="utf-8"))
    rows = record["results"]["rows"]
    assert len(rows) == 9
    for row in rows.values():
        for book in ("moby_dick", "emma"):
            assert math.isfinite(row["books"][book]["loss"])
            assert row["books"][book]["num_windows"] == 2
    differences = record["results"]["differences"]
    assert set(differences) == {"control - hybrid", "branch off - hybrid", "without alignment - hybrid"}
    for found in differences.values():
        assert found["all books"]["num_pairs"] == 4
    hybrid, control = rows["hybrid"], rows["control: window + sinks, same budget"]
    assert 0.7 < control["num_trained"] / hybrid["num_trained"] < 1.5  # a rank is a whole number
    assert all(check["passed"] for check in record["results"]["report"]["checks"])
    assert [stage["steps"] for stage in record["config"]["stages"]] == [3, 3]
    facts = record["results"]["runs"]["hybrid"]
    assert [stage["name"] for stage in facts["stages"]] == ["align", "tune"]
    assert set(facts["stages"][0]["last"]) == {"layer_0", "layer_1", "loss"}
    assert set(facts["window_shares"]) == {"0", "1"}
    assert all(0 < share < 1 for share in facts["window_shares"].values())
    assert record["results"]["runs"]["unaligned"]["num_tokens"] == facts["num_tokens"] == 6 * 48
    assert not (converted / "work").exists()  # nothing is left to go on with
    page = (converted / "index.html").read_text(encoding="utf-8")
    for path in ("report.json", "index.html", "conversion.json"):
        assert str(converted.parent) not in (converted / path).read_text(encoding="utf-8")
    for part in (
        "control - hybrid, moby_dick",
        "hybrid: align",
        "share of the window",
        "Perplexity by position",
    ):
        assert part in page


def test_rows_can_be_asked_what_they_recall(source: Path, tmp_path: Path) -> None:
    asked = {"type": "needle_text", "seq_len": 200, "num_digits": 1, "num_examples": 3}
    recipe = ConversionRecipe(
        target={"type": "allmem", "window_size": 16, "chunk_size": 8, "recompute": False},
        stages=[
            {**ALIGN, "seq_len": 250},
            {"name": "tune", "loss": {"kl": 1.0}, "train": "new", "steps": 1, "lr": 0.001, "seq_len": 250},
        ],
        data={"type": "text_task", "task": {"type": "needle_text", "text": "emma", "num_digits": 1}},
        recall=asked,
    )

    def rows() -> list[Row]:
        return convert_and_compare(
            memzoo.load(source), str(source), recipe, tmp_path, tokens={}, settings=QUIET
        )[0]

    found = rows()
    for row in found:
        assert row.recall is not None
        assert row.recall["num_examples"] == 3
        assert math.isfinite(row.recall["loss"])
    by_name = {row.name: row for row in found}
    off, before = by_name["hybrid, memory branch off"], by_name["window 16"]
    assert off.recall["loss"] == before.recall["loss"]  # the weights of the window stay as they were
    assert by_name["hybrid"].recall["loss"] != off.recall["loss"]
    assert [row.recall for row in rows()] == [row.recall for row in found]  # kept, not measured again
    assert "recall" in comparison_table(found).splitlines()[0]
    results = comparison_results(found)["rows"]["hybrid"]
    assert results["recall"]["accuracy"] == by_name["hybrid"].recall["accuracy"]


@pytest.mark.parametrize("layers", [None, {"method": "mse", "keep": 1}])
@pytest.mark.parametrize("ablations", [False, True])
@pytest.mark.parametrize("control", [False, True])
def test_parts_are_counted(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: object,
    ablations: bool,
    control: bool,
) -> None:
    said: list[str] = []
    label = Workshop._label
    monkeypatch.setattr(Workshop, "_label", lambda shop, name: said.append(label(shop, name)) or said[-1])
    recipe = ConversionRecipe(target=TARGET, layers=layers, stages=[ALIGN, {**TUNE, "steps": 1}])
    convert(source, tmp_path, recipe, comparison=Comparison(control=control, ablations=ablations))
    assert [line.split()[0] for line in said] == [f"[{n}/{len(said)}]" for n in range(1, len(said) + 1)]


def test_the_card_says_what_the_model_is(source: Path, converted: Path) -> None:
    for name in ("hybrid", "control"):
        card = (converted / name / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == "memzoo"
        assert "lolcats" in front["tags"]
        assert "control - hybrid, moby_dick" in card
        assert "| tune | " in card
        assert f"base_model: {source.name}" in card
        assert "Low-rank updates are merged" in card
        assert str(source) not in card
        assert ("control" in card.split("## Training")[0]) is (name == "control")


def test_results_are_replaced_only_when_asked_and_only_by_results(
    source: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "results"
    shutil.copytree(converted, output)
    arguments = ["convert", "--source", str(source), "--output", str(output), "--num_windows", "2"]
    arguments += ["--recipe", str(converted / "recipe.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(folder_reader, "load_model", lambda path: pytest.fail("the teacher was loaded"))
        assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "--overwrite" in message
    assert all(repr(str(output / name)) in message for name in ("hybrid", "control", "report.json"))

    def stopped(*given, on_trained, saves, **options):
        if saves:
            on_trained("hybrid", SimpleNamespace(model=given[0]))
        raise ValueError("stopped")

    where = "memzoo.train.conversion.run.convert_and_compare"
    monkeypatch.setattr(where, partial(stopped, saves=False))
    assert main([*arguments, "--overwrite", "--control", "false"]) == 2
    assert sorted(path.name for path in output.iterdir()) == [
        "control", "hybrid", "index.html", "recipe.yaml", "report.json"
    ]  # fmt: skip
    monkeypatch.setattr(where, partial(stopped, saves=True))
    assert main([*arguments, "--overwrite", "--control", "false"]) == 2
    assert sorted(path.name for path in output.iterdir()) == ["hybrid", "recipe.yaml"]
    assert memzoo.load(output / "hybrid").config == memzoo.load(source).config


def test_load_takes_names_of_dtypes_and_refuses_what_is_not_there(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memzoo.load(source, dtype="bfloat16").embed_tokens.weight.dtype == torch.bfloat16
    assert memzoo.load(source, dtype=torch.float64).embed_tokens.weight.dtype == torch.float64
    for dtype in ("bflaot16", "int8", "nn", 16):
        with pytest.raises(ValueError, match="dtype must be"):
            memzoo.load(source, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="finds no CUDA device"):
            memzoo.load(source, device="cuda")
    monkeypatch.setattr("memzoo.models.checkpoints.fetch.fetch_smollm2", lambda: source)
    assert memzoo.load("smollm2-135m").config == memzoo.load(source).config
    with pytest.raises(TypeError, match="or a YAML file, got dict"):
        memzoo.convert(source, "x", recipe={"seed": 3})


def test_the_folders_load_everywhere(converted: Path) -> None:
    ids = torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    for name in ("hybrid", "control"):
        ours = memzoo.load(converted / name)
        other = AutoModelForCausalLM.from_pretrained(converted / name).eval()
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, other(ids).logits)
        assert other.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 34)


def test_training_changed_what_it_should(source: Path, converted: Path) -> None:
    teacher, hybrid = memzoo.load(source).state_dict(), memzoo.load(converted / "hybrid").state_dict()
    for name, weight in teacher.items():
        tuned = name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
        close = torch.allclose(weight, hybrid[name], atol=2e-2)  # the hybrid went through bfloat16
        assert close or tuned, name
        if tuned:
            assert not torch.equal(weight.bfloat16(), hybrid[name].bfloat16()), name


def test_memory_off_leaves_the_window(converted: Path) -> None:
    hybrid = memzoo.load(converted / "hybrid")
    ids = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        on = hybrid(ids).logits
        with memory_off(hybrid):
            off = hybrid(ids).logits
        torch.testing.assert_close(on[:, :16], off[:, :16], atol=1e-4, rtol=0)  # within the window
        assert (on[:, 18:] - off[:, 18:]).abs().max() > 1e-4
        assert torch.equal(hybrid(ids).logits, on)
    with (
        pytest.raises(ValueError, match="no mixer of this model has a memory"),
        memory_off(memzoo.load(converted / "control")),
    ):
        pass


def stage(text: str, of: str = "{name: tune, loss: {kl: 1}, train: lora, steps: 3, lr: 0.1}") -> str:
    """A recipe whose only stage has some fields replaced."""
    values = {**yaml.safe_load(of), **yaml.safe_load(text)}
    return f"stages: [{json.dumps(values)}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stagez: []", "Did you mean 'stages'"),
        ("- 1", "must hold a mapping"),
        ("stages: [", "is not a YAML file"),
        ("target: {window_size: 4}", "needs a type"),
        ("target: lolcats", "must be a mapping"),
        ("stages: 3", "stages must be a list"),
        ("stages: [3]", "stage 0 must be a mapping"),
        ("stages: [{name: a}]", "stage 0: .*missing"),
        ("stages: [{name: a, lost: {}}]", "unknown key 'lost' in stage 0. Did you mean 'loss'"),
        (stage("name: a b"), "needs a name of at most 50 letters"),
        (stage(f"name: {'a' * 51}"), "needs a name of at most 50 letters"),
        (stage("loss: {kll: 1}"), "Did you mean 'kl'"),
        (stage("loss: {kl: 1, mixer_out: 1}"), "cannot be mixed.*use two stages"),
        (stage("{loss: {kl: 0, ce: 0}}"), "all weights of its losses are 0"),
        (stage("loss: {}"), "loss must map losses to weights"),
        (stage("loss: {kl: -1}"), "the weight of kl must be a number of at least 0"),
        (stage("train: everything"), "train must be one of new, mixers, lora, all"),
        (stage("loss: {mixer_out: 1}"), "an alignment trains parts of the new mixers"),
        (stage("seq_len: 0"), "seq_len must be an integer of at least 1, got 0"),
        (stage("seq_len: 1e3"), "seq_len must be an integer of at least 1, got '1e3'"),
        (stage("steps: abc"), "steps must be an integer of at least 0, got 'abc'"),
        (stage("steps: 2.5"), "steps must be an integer"),
        (stage("batch_size: true"), "batch_size must be an integer"),
        (stage("lora_rank: 0"), "lora_rank must be an integer of at least 1"),
        (stage("lr: -1"), "lr must be a positive number"),
        (stage("lr: 1e-3"), "lr must be .* got '1e-3'. Write it as 0.001"),
        (stage("new_lr_scale: .nan").replace("NaN", ".nan"), "new_lr_scale must be a number of at least 0"),
        (stage("window_dropout: 1.5"), "window_dropout must be a share"),
        (stage("sizes: 3"), "sizes must map names to ranges, got 3"),
        (stage("sizes: {window: [1, 2]}"), "unknown size 'window'.*window_size"),
        (stage("sizes: {window_size: 4}"), "window_size must be the smallest and the largest integer, got 4"),
        (stage("sizes: {window_size: [0, 4]}"), "window_size must go from at least 1"),
        (stage("sizes: {num_sinks: [4, 2]}"), "num_sinks must go from at least 0"),
        (stage("normalize: 3"), "normalize must be true or false"),
        (stage("{loss: {mixer_out: 1}, train: new, recompute: true}"), "recompute has no effect"),
        (stage("tokens: some"), "tokens must be one of all, labelled, got 'some'"),
        (stage("{loss: {ce: 1}, tokens: all}"), "ce is taken where the data asks.*Leave tokens out"),
        (stage("schedule: plateau"), "schedule must be cosine, linear or constant"),
        ("data: mytext.txt", "data must be a mapping"),
        ("layers: []", "layers must name a block"),
        ("layers: {method: unifrom}", "Did you mean 'uniform'"),
        ("layers: {keep: 1.5}", "a share below 1, got 1.5"),
        ("layers: {keeep: 1}", "Did you mean 'keep'"),
        ("gqa: share", "gqa must be one of keep, expand"),
        ("control: {window: 3}", "control must give window_size"),
        ("recall: needle_text", "recall must be a mapping"),
        ("recall: {type: needle}", "Did you mean 'needle_text'"),
        ("recall: {type: needle_text, num_asks: 3}", "Did you mean 'num_asked'"),
        ("recall: {type: needle_text, num_examples: 0}", "num_examples must be an integer of at least 1"),
        ("seed: -1", "seed must be an integer"),
        ("seed: 4294967295", "seed must be an integer from 0 to 42949672"),
    ],
)
def test_refuses_a_bad_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_recipe(str(path))


def test_a_mistake_is_told_before_any_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_reader, "load_model", lambda path: pytest.fail("the teacher was loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "hybrid").write_text("")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "hybrid").symlink_to(source)
    (tmp_path / "ce.yaml").write_text(stage("loss: {ce: 1}"), encoding="utf-8")
    given, fresh = ["--source", str(source)], ["--output", str(tmp_path / "x")]
    for arguments, message in (
        ([*given, *fresh, "--recipe", "lolcat"], "convert/lolcats"),
        (["--source", str(tmp_path / "nowhere"), *fresh], "nowhere"),
        ([*given, "--output", str(source / "config.json")], "config.json"),
        ([*given, "--output", str(tmp_path / "taken")], "taken/hybrid"),
        ([*given, *fresh, "--books", "[emma, moby_duck]"], "moby_dick"),
        ([*given, *fresh, "--books", "moby_duck"], "moby_dick"),
        ([*given, *fresh, "--num_windows", "1"], "num_windows must be at least 2"),
        ([*given, *fresh, "--num_windows", "100000"], "room for"),
        ([*given, *fresh, "--window_size", "0"], "window_size must be at least 1"),
        ([*given, *fresh, "--accelerator", "gppu"], "accelerator 'gppu' cannot be used"),
        ([*given, *fresh, "--steps", "{alingn: 3}"], "Did you mean 'align'"),
        ([*given, *fresh, "--save_seconds", "-1"], "save_seconds"),
        ([*given, *fresh, "--books", "[state_of_the_union]"], "'state_of_the_union' is in the training text"),
        ([*given, "--output", str(tmp_path / "own")], "would be replaced by the result"),
        ([*given, *fresh, "--guide", str(source), "--recipe", str(tmp_path / "ce.yaml")], "has no effect"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: {type: sliding_window, window_size: 8}", "no mixer of this model has a memory"),
        ("target: {type: lolcat}", "Did you mean 'lolcats'?"),
        ("target: {type: lolcats, window_sizes: 8}", "Did you mean 'window_size'?"),
        ("target: {type: lolcats, window_size: 0}", "window_size must be"),
        ("target: {type: lolcats, num_kv_heads: 3}", "num_kv_heads=3, the attention of layer 0 has 1"),
        ("target: {type: lolcats, num_heads: 4}", "Leave num_heads out"),
        ("target: {type: lolcats, head_dim: 4}", "Leave head_dim out"),
        ("target: {type: lolcats, d_model: 32}", "d_model=32, the attention of layer 0 has 16"),
        ("layers: [2]", "numbers from 0 to 1, got [2]"),
        ("layers: [0, 0]", "distinct numbers"),
        ("layers: all", "Leave layers out"),
        ("layers: {keep: 3}", "keep=3 of 2 blocks"),
        ("layers: {method: mse, keep: 3}", "keep=3 of 2 blocks"),
        ("layers: {keep: 2}", "converts no block"),
        (stage("lora_targets: [q_prjo]"), "Did you mean 'q_proj'?"),
        (stage("lora_targets: [v_proj, q_prjo]"), "Did you mean 'q_proj'?"),
        (stage("lora_targets: [lm_head]"), "no linear layer 'lm_head' in its"),
        (stage("seq_len: 64"), "seq_len must be above window_size + num_sinks = 68"),
        (stage("{loss: {hidden: 1}, train: new}"), "no stage with the loss kl or ce"),
        ("{layers: {method: mse}, " + stage("{}") + "}", "need an alignment stage"),
        ("stages: []", "has no stages. Add one"),
        (
            "target: {type: parallel, mixers: [{type: based}, {type: sliding_window, window_size: 4}]}",
            "the window of a parallel target comes first",
        ),
        ("{layers: {method: mse, keep: 2}, stages: " + json.dumps([ALIGN, TUNE]) + "}", "converts no block"),
        (
            "{target: {type: linear_attention}, " + stage("train: new") + "}",
            "train=new has nothing to train: every parameter of linear_attention is taken over",
        ),
        (
            "{target: {type: linear_attention}, " + stage("window_dropout: 0.5") + "}",
            "window_dropout has no effect, linear_attention has no window",
        ),
        (
            "{target: {type: lolcats}, " + stage("sizes: {chunk_size: [2, 4]}") + "}",
            "sizes has chunk_size, which lolcats does not have",
        ),
        (
            "{target: {type: based}, stages: " + json.dumps([{**ALIGN, "loss": {"attn_out": 1}}, TUNE]) + "}",
            "the loss attn_out compares heads",
        ),
        ("data: {texts: emma, contiguous: true}", "contiguous has no effect"),
        ("data: {texts: emma, num_workers: 2}", "num_workers has no effect"),
        ("data: {texts: [state_of_union]}", "state_of_the_union"),
        ("data: {files: nowhere.txt}", "nowhere.txt"),
        ("data: {text: emma}", "data: unknown key 'text'. Did you mean 'texts'"),
        ("data: {texts: emma, seq_len: 3}", "seq_len is set by the stages"),
        ("data: {type: mqar}", "data type 'mqar' has no text for a conversion"),
        ("data: {append_eos: true}", "no text to train on"),
        ("data: {texts: null}", "data: texts must be a list of texts or a text, got None"),
        ("data: {files: [5]}", "data: files must be a list of texts or a text, got [5]"),
        ("data: {texts: emma, append_eos: 'no'}", "data: append_eos must be true or false, got 'no'"),
        ("data: {texts: emma, val_fraction: null}", "data: val_fraction must be a number, got None"),
        ("data: {type: [text]}", "has no text for a conversion"),
        ("data: {dataset: text}", "data: dataset must be a mapping or null, got 'text'"),
        ("data: {dataset: {}}", "data: dataset: DatasetSource.__init__() missing"),
        ("data: {dataset: {path: json, max_rows: a}}", "data: dataset.max_rows must be an integer or null"),
        ("data: {dataset: {paht: x}}", "data: unknown key 'paht' in dataset. Did you mean 'path'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_the_teacher_is_loaded(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    monkeypatch.setattr(folder_reader, "load_model", lambda path: pytest.fail("the teacher was loaded"))
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    places = ["--source", str(source), "--output", str(tmp_path / "x")]
    assert main(["convert", *places, "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_dry_run_says_what_the_surgery_does(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "recipe.yaml").write_text(
        "{target: {type: linear_attention, feature_map: hedgehog}, gqa: expand}", encoding="utf-8"
    )
    places = ["--source", str(source), "--output", str(tmp_path / "x")]
    assert main(["convert", *places, "--recipe", str(tmp_path / "recipe.yaml"), "--dry_run", "true"]) == 0
    said, waiting = capsys.readouterr()
    assert "surgery and parity checks ..." in waiting
    for line in (
        "converted blocks: 0, 1",
        "heads repeated: 4 parameters (k_proj.weight, v_proj.weight)",
        "passed: logits that are not finite: 0",
        "q_map.",
        "without a place any more: 0 parameters",
    ):
        assert line in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: File too large")]
)
def test_full_storage_is_told_with_the_way_on(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("memzoo.train.conversion.run.convert_and_compare", full)
    assert main(["convert", "--source", str(source), "--output", str(tmp_path / "x"), "--books", "[]"]) == 2
    said = capsys.readouterr().err
    assert "could not write to its storage" in said
    assert "give the same command again to go on" in said


def test_without_books_there_is_no_line_of_windows(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args, **options):
        raise ValueError("stopped")

    monkeypatch.setattr("memzoo.train.conversion.workshop.Workshop.train", stopped)
    places = ["--source", str(source), "--output", str(tmp_path / "x")]
    assert main(["convert", *places, "--books", "[]"]) == 2
    shown = capsys.readouterr().err
    assert "stopped" in shown
    assert "window/s" not in shown


def test_the_control_has_the_window_of_the_target(source: Path) -> None:
    config = folder_reader.read_model_config(source)
    for target, window in (
        ({"type": "lolcats"}, {"window_size": 64, "num_sinks": 0}),
        ({"type": "linear_attention"}, {"window_size": 64, "num_sinks": 4}),
        (
            {"type": "parallel", "combine": "channel", "mixers": [
                {"type": "sliding_window", "window_size": 8, "num_sinks": 2}, {"type": "linear_attention"},
            ]},
            {"window_size": 8, "num_sinks": 2},
        ),
    ):  # fmt: skip
        mixers = {**ALIGN, "seq_len": 80, "train": "mixers"}
        recipe = ConversionRecipe(target=target, stages=[mixers, {**TUNE, "seq_len": 80}])
        check_recipe(recipe, config)
        assert control_plan(recipe).target == {"type": "sliding_window", **window}
    own = ConversionRecipe(target={"type": "linear_attention"}, control={"window_size": 5})
    assert control_plan(own).target == {"type": "sliding_window", "window_size": 5}


def test_a_source_without_attention_is_refused() -> None:
    mamba = ModelConfig(vocab_size=7, d_model=8, layers=[{"type": "mamba1"}])
    with pytest.raises(ValueError, match="layer 0 of the source is 'mamba1', which has no heads"):
        check_recipe(ConversionRecipe(), mamba)


SHIPPED = [name.removeprefix("convert/") for name in configs.names() if name.startswith("convert/")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(source: Path, tmp_path: Path, name: str) -> None:
    stages = [stage.name for stage in read_recipe(name).all_stages]
    recipe = read_recipe(name, seed=3, steps=dict.fromkeys(stages, 1))
    assert recipe.seed == 3
    check_recipe(recipe, folder_reader.read_model_config(source))
    assert control_plan(recipe).target["num_sinks"] == recipe.target.get("num_sinks", 4)
    # the text of this test is shorter than those of the recipes
    short = [replace(stage, seq_len=min(stage.seq_len, 1024)) for stage in recipe.all_stages]
    recipe = replace(recipe, stages=short)
    if recipe.recall is not None:  # bytes are shorter than tokens
        recipe = replace(recipe, recall={**recipe.recall, "seq_len": 900, "num_examples": 2})
    found = convert(source, tmp_path, recipe)
    assert [facts.steps for facts in found["hybrid"].stages] == [1] * len(stages)
    assert found["control"].num_tokens == found["hybrid"].num_tokens


def test_hybrid_and_control_read_the_same_tokens_in_the_same_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[torch.Tensor]] = {"hybrid": [], "control": []}
    for module in (AlignmentModule, DistillModule):
        step = module.training_step

        def recording(self, batch, batch_idx, step=step):
            names = {mixer.type for mixer in self._network.config.mixers} if hasattr(self, "_network") else {}
            read["control" if "sliding_window" in names else "hybrid"].append(batch.input_ids.clone())
            return step(self, batch, batch_idx)

        monkeypatch.setattr(module, "training_step", recording)
    recipe = ConversionRecipe(target=TARGET, stages=[ALIGN, TUNE])
    found = convert(source, tmp_path / "a", recipe)
    assert torch.equal(torch.cat(read["hybrid"]), torch.cat(read["control"]))
    assert len({tuple(row.tolist()) for row in torch.cat(read["control"])}) == 5  # nothing is read twice
    again = convert(source, tmp_path / "b", recipe, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    third = convert(source, tmp_path / "c", recipe, cache=tmp_path / "cache")
    for name in ("hybrid", "control"):
        for weight, tensor in found[name].model.state_dict().items():
            assert torch.equal(again[name].model.state_dict()[weight], tensor), weight
            assert torch.equal(third[name].model.state_dict()[weight], tensor), weight


def test_batches_of_another_size_are_read_by_both_too(source: Path, tmp_path: Path) -> None:
    longer = {**TUNE, "name": "long", "loss": {"ce": 1.0}, "seq_len": 60, "batch_size": 2, "steps": 2}
    found = convert(source, tmp_path, ConversionRecipe(target=TARGET, stages=[ALIGN, TUNE, longer]))
    assert found["hybrid"].num_tokens == found["control"].num_tokens == 5 * 24 + 2 * 120
    assert [facts.steps for facts in found["control"].stages] == [7]


@pytest.mark.parametrize(("align", "tune", "scale"), [(1, 0, 1.0), (0, 1, 1.0), (0, 1, 0.0)])
def test_only_numbers_that_were_trained_are_counted(
    source: Path, tmp_path: Path, align: int, tune: int, scale: float
) -> None:
    recipe = ConversionRecipe(
        target={"type": "lolcats", "window_size": 8, "feature_dim": 4},
        stages=[{**ALIGN, "steps": align}, {**TUNE, "steps": tune, "new_lr_scale": scale}],
    )
    found = convert(source, tmp_path, recipe, comparison=Comparison(control=False))["hybrid"]
    untrained, _ = convert_mixers(memzoo.load(source), ConversionPlan(target=recipe.target))
    new = sum(untrained.state_dict()[name].numel() for name in found.report.new_parameters)
    low_rank = 2 * 2 * (4 * 16 - 8)  # per layer: q and o map 16 to 16, k and v 16 to 8
    expected = (new if align or (tune and scale) else 0) + (low_rank if tune else 0)
    assert found.num_trained == expected


@pytest.mark.parametrize("train", ["mixers", "all"])
def test_the_control_trains_as_much_as_the_hybrid(source: Path, tmp_path: Path, train: str) -> None:
    target = {"type": "linear_attention"}
    stages = [{**ALIGN, "train": "mixers", "loss": {"hidden": 1.0}}, {**TUNE, "train": train}]
    found = convert(source, tmp_path, ConversionRecipe(target=target, stages=stages))
    hybrid, control = found["hybrid"], found["control"]
    assert control.num_trained == hybrid.num_trained
    expected = sum(
        tensor.numel()
        for name, tensor in hybrid.model.named_parameters()
        if train == "all" or ".mixer." in name
    )
    assert hybrid.num_trained == expected


def test_every_alignment_loss_falls(source: Path, tmp_path: Path) -> None:
    for loss in ("mixer_out", "attn_out", "hidden"):
        for normalize in (True, False):
            stages = [{**ALIGN, "loss": {loss: 1.0}, "normalize": normalize, "steps": 12, "lr": 0.03}]
            recipe = ConversionRecipe(target={**TARGET, "window_size": 4}, stages=stages)
            folder = tmp_path / f"{loss}-{normalize}"
            found = convert(source, folder, recipe, comparison=Comparison(control=False))["hybrid"]
            history = found.stages[0].history["loss"]
            assert sum(history[-3:]) < sum(history[:3]), loss


def test_window_dropout_shrinks_the_window_in_the_steps_it_draws(source: Path, tmp_path: Path) -> None:
    reach: list[dict[str, int]] = []
    recipe = ConversionRecipe(target=TARGET, stages=[{**TUNE, "window_dropout": 0.5, "steps": 8}])
    original = MemoryLM.forward

    def recording(self, *args, overrides=None, **options):
        if self.training:
            reach.append(dict(overrides or {}))
        return original(self, *args, overrides=overrides, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLM, "forward", recording)
        convert(source, tmp_path, recipe, comparison=Comparison(control=False))
    assert len(reach) == 8
    assert {tuple(step) for step in reach} == {(), ("window_size",)}


def test_sizes_are_drawn_anew_in_every_step_and_the_control_keeps_its_own(
    source: Path, tmp_path: Path
) -> None:
    target = {"type": "allmem", "window_size": 8, "mem_dim": 8, "chunk_size": 8}
    sizes = {"window_size": [2, 20], "num_sinks": [0, 3], "chunk_size": [2, 20]}
    recipe = ConversionRecipe(
        target=target,
        stages=[{**TUNE, "train": "new", "sizes": sizes, "steps": 6}],
        control={"window_size": 8},
    )
    drawn: list[dict[str, int]] = []
    original = MemoryLM.forward

    def recording(self, *args, overrides=None, **options):
        if self.training:
            drawn.append(dict(overrides or {}))
        return original(self, *args, overrides=overrides, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLM, "forward", recording)
        convert(source, tmp_path, recipe)
    own, control = drawn[:6], drawn[6:]
    assert control == [{}] * len(control)
    assert len(control) >= 6
    assert all(sizes[name][0] <= step[name] <= sizes[name][1] for step in own for name in sizes)
    assert len({tuple(sorted(step.items())) for step in own}) > 3


@pytest.mark.parametrize("method", ["uniform", "even_odd", "mse", "loss"])
def test_layers_are_chosen_and_the_control_has_the_same(source: Path, tmp_path: Path, method: str) -> None:
    selection = {"method": method, "keep": 1}
    found = convert(source, tmp_path, ConversionRecipe(target=TARGET, layers=selection, stages=[ALIGN, TUNE]))
    (layer,) = found["hybrid"].report.layers
    assert found["control"].report.layers == [layer]
    types = [mixer.type for mixer in found["hybrid"].model.config.mixers]
    assert types[layer] == "lolcats"
    assert types[1 - layer] == "attention"
    assert {"uniform": [1], "even_odd": [0]}.get(method, [layer]) == [layer]


def test_a_larger_guide_is_learned_from(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.from_dict({**memzoo.load(source).config.to_dict(), "d_model": 24, "num_layers": 3,
        "layers": {"type": "attention"}, "vocab_size": 260})  # fmt: skip
    torch.manual_seed(1)
    guide = MemoryLM(config)
    recipe = ConversionRecipe(target=TARGET, stages=[ALIGN, {**TUNE, "steps": 20, "lr": 0.02}])
    own = convert(source, tmp_path / "own", recipe)
    guided = convert(source, tmp_path / "guided", recipe, guide=guide)
    for run in ("hybrid", "control"):
        losses = guided[run].stages[-1].history["kl"]
        assert losses[-1] < losses[0]
        assert losses[0] > 5 * own[run].stages[-1].history["kl"][0]
    alignment = [found["hybrid"].stages[0].history["loss"] for found in (own, guided)]
    assert alignment[0] == alignment[1]  # mixers are compared with the source
    (tmp_path / "own" / "work").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="other guide"):
        convert(source, tmp_path / "own", recipe, guide=guide)
    other = tmp_path / "other"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    save_model(guide, other, words)
    places = ["--source", str(source), "--output", str(tmp_path / "x"), "--guide", str(other)]
    assert main(["convert", *places]) == 2
    assert "has another vocabulary" in capsys.readouterr().err


def test_batches_may_be_accumulated_and_blocks_run_again(source: Path, tmp_path: Path) -> None:
    found = {}
    for name, sizes in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "accumulate": 2})):
        stages = [{**TUNE, **sizes, "recompute": name == "two"}]
        found[name] = convert(source, tmp_path / name, ConversionRecipe(target=TARGET, stages=stages))
    for run in ("hybrid", "control"):
        one, two = found["one"][run], found["two"][run]
        assert one.num_tokens == two.num_tokens == 3 * 4 * 24
        assert len(two.stages[0].history["loss"]) == 6
        pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 2e-2  # bfloat16, other sums
        assert one.stages[0].history["loss"][0] == pytest.approx(
            sum(two.stages[0].history["loss"][:2]) / 2, rel=1e-2
        )


def test_weights_of_losses_are_replaced_by_name() -> None:
    recipe = read_recipe("trimkv", loss={"gates": {"kl": 0, "ce": 1.0}})
    assert recipe.all_stages[0].loss == {"kl": 0, "ce": 1.0, "capacity": 1.0}
    for loss, message in (
        ({"gate": {"kl": 1}}, "no stage 'gate'. Did you mean 'gates'"),
        ({"gates": {"klo": 1}}, "unknown loss 'klo'. Did you mean 'kl'"),
        ({"gates": {"kl": 0, "ce": 0, "capacity": 0}}, "all weights of its losses are 0"),
        ({"gates": 3}, "losses must be a mapping, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe("trimkv", loss=loss)  # type: ignore[arg-type]


def test_gates_are_written_alone(source: Path, tmp_path: Path) -> None:
    losses = "{kl: 0.5, ce: 0.5, capacity: 1.0}"
    text = stage(f"{{name: gates, loss: {losses}, train: new, seq_len: 24, budget: 4, steps: 1}}")
    recipe = "target: {type: gated_attention, gate_width: 4, train_length: 24}\n" + text
    (tmp_path / "gates.yaml").write_text(recipe, encoding="utf-8")
    given = ["--source", str(source), "--output", str(tmp_path), "--recipe", str(tmp_path / "gates.yaml")]
    options = ["--control", "false", "--books", "[]", "--loss", "{gates: {capacity: 0}}"]
    assert main(["convert", *given, *options]) == 0
    gated = folder_reader.load_model(tmp_path / "hybrid")
    loaded = load_gates(folder_reader.load_model(source), tmp_path / "gates")
    for name, weight in gate_weights(gated).items():
        assert torch.equal(gate_weights(loaded)[name], weight)
    used = json.loads((tmp_path / "report.json").read_text())["config"]["stages"][0]["loss"]
    assert used == {"kl": 0.5, "ce": 0.5, "capacity": 0}


def test_steps_of_stages_are_replaced_by_name() -> None:
    recipe = with_steps(ConversionRecipe(stages=[Stage(**ALIGN), TUNE]), {"tune": 9})
    assert [stage.steps for stage in recipe.all_stages] == [2, 9]
