"""The conversion command from end to end, on a model of two small layers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import memzoo
import memzoo.models.hf
from memzoo.cli import main
from memzoo.models.checkpoints import folder as folder_reader
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import convert_mixers, memory_off
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.train.convert import run_control, run_recipe
from memzoo.train.data.tokenizers import load_tokenizer
from memzoo.train.distillation import AlignmentModule, DistillModule, TeacherReadings
from memzoo.train.recipe import ConversionRecipe, check_recipe, read_recipe, window_only

RECIPE = """
target: {type: lolcats, window_size: 16, num_sinks: 2, feature_dim: 4}
seq_len: 48
align_steps: 3
tune_steps: 3
lora_rank: 2
"""


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
        assert main(["convert", *arguments, "--num_windows", "2", "--accelerator", "cpu"]) == 0
    assert shown.getvalue().splitlines()[-1] == f"model written to {output / 'hybrid'}"
    return output


def test_writes_both_models_and_a_report(converted: Path) -> None:
    record = json.loads((converted / "report.json").read_text(encoding="utf-8"))
    rows = record["results"]["rows"]
    assert len(rows) == 7
    for row in rows.values():
        for book in ("moby_dick", "emma"):
            assert math.isfinite(row["books"][book]["loss"])
            assert row["books"][book]["num_windows"] == 2
    differences = record["results"]["differences"]
    assert set(differences) == {"control - hybrid", "branch off - hybrid"}
    for found in differences.values():
        assert found["all books"]["num_pairs"] == 4
    hybrid, control = rows["hybrid"], rows["control: window + sinks, same budget"]
    assert 0.7 < control["num_trained"] / hybrid["num_trained"] < 1.5  # a rank is a whole number
    assert all(check["passed"] for check in record["results"]["report"]["checks"])
    assert record["config"]["align_steps"] == 3


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

    monkeypatch.setattr("memzoo.train.convert.convert_and_compare", partial(stopped, saves=False))
    assert main([*arguments, "--overwrite", "--control", "false"]) == 2
    assert sorted(path.name for path in output.iterdir()) == [
        "control", "hybrid", "recipe.yaml", "report.json"
    ]  # fmt: skip
    monkeypatch.setattr("memzoo.train.convert.convert_and_compare", partial(stopped, saves=True))
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
        memzoo.convert(source, "x", recipe={"align_steps": 3})


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("align_stepz: 3", "Did you mean 'align_steps'"),
        ("- 1", "must hold a mapping"),
        ("target: {window_size: 4}", "needs a type"),
        ("seq_len: 0", "seq_len must be an integer of at least 1, got 0"),
        ("seq_len: 1e3", "seq_len must be an integer of at least 1, got '1e3'"),
        ("tune_steps: abc", "tune_steps must be an integer of at least 0, got 'abc'"),
        ("align_steps: 2.5", "align_steps must be an integer"),
        ("batch_size: true", "batch_size must be an integer"),
        ("lora_rank: -1", "lora_rank must be an integer of at least 0"),
        ("align_lr: -1", "align_lr must be a positive number"),
        ("tune_lr: 1e-3", "tune_lr must be .* got '1e-3'. Write it as 0.001"),
        ("new_lr_scale: .nan", "new_lr_scale must be a number of at least 0"),
        ("{kl_weight: 0, ce_weight: 0}", "must not both be 0"),
        ("files: mytext.txt", r"files must be a list .* Write files: \[NAME"),
        ("texts: [3]", "texts must be a list"),
        ("layers: []", "layers must name a block"),
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
    given, fresh = ["--source", str(source)], ["--output", str(tmp_path / "x")]
    for arguments, message in (
        ([*given, *fresh, "--recipe", "lolcat"], "convert/lolcats"),
        (["--source", str(tmp_path / "nowhere"), *fresh], "nowhere"),
        ([*given, "--output", str(source / "config.json")], "config.json"),
        ([*given, "--output", str(tmp_path / "taken")], "taken/hybrid"),
        ([*given, *fresh, "--books", "[emma, moby_duck]"], "moby_dick"),
        ([*given, *fresh, "--books", "moby_duck"], "moby_dick"),
        ([*given, *fresh, "--num_windows", "0"], "num_windows >= 1"),
        ([*given, *fresh, "--num_windows", "100000"], "room for"),
        ([*given, *fresh, "--accelerator", "gppu"], "accelerator 'gppu' cannot be used"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: {type: linear_attention}", "has no window_size"),
        ("target: {type: sliding_window}", "has no window_size"),
        ("target: {type: sliding_window, window_size: 8}", "no mixer of this model has a memory"),
        ("target: {type: lolcat}", "Did you mean 'lolcats'?"),
        ("target: {type: lolcats, window_sizes: 8}", "Did you mean 'window_size'?"),
        ("target: {type: lolcats, window_size: 0}", "window_size must be"),
        ("target: {type: lolcats, num_kv_heads: 3}", "num_kv_heads=3, the attention of layer 0 has 1"),
        ("target: {type: lolcats, num_heads: 4}", "Leave num_heads out"),
        ("target: {type: lolcats, head_dim: 4}", "Leave head_dim out"),
        ("target: {type: lolcats, d_model: 32}", "d_model=32, the attention of layer 0 has 16"),
        ("target: lolcats", "must be a mapping"),
        ("layers: [2]", "numbers from 0 to 1, got [2]"),
        ("layers: [0, 0]", "distinct numbers"),
        ("layers: all", "Leave layers out"),
        ("lora_targets: [q_prjo]", "Did you mean 'q_proj'?"),
        ("lora_targets: [v_proj, q_prjo]", "Did you mean 'q_proj'?"),
        ("{seq_len: 18, target: {type: lolcats, window_size: 16, num_sinks: 2}}", "seq_len must be above"),
        ("texts: [state_of_union]", "state_of_the_union"),
        ("files: [nowhere.txt]", "nowhere.txt"),
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


def test_without_books_there_is_no_line_of_windows(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args, **options):
        raise ValueError("stopped")

    monkeypatch.setattr("memzoo.train.convert.run_recipe", stopped)
    places = ["--source", str(source), "--output", str(tmp_path / "x")]
    assert main(["convert", *places, "--books", "[]"]) == 2
    shown = capsys.readouterr().err
    assert "stopped" in shown
    assert "window/s" not in shown


def test_the_window_of_a_target_is_that_of_its_config(source: Path) -> None:
    assert window_only({"type": "lolcats"}) == {"type": "sliding_window", "window_size": 64, "num_sinks": 0}
    check_recipe(ConversionRecipe(target={"type": "lolcats"}), folder_reader.read_model_config(source))


def test_shipped_recipes_are_valid() -> None:
    for name in ("demo", "lolcats"):
        recipe = read_recipe(name, seed=3)
        assert isinstance(recipe, ConversionRecipe)
        assert recipe.seed == 3
        assert window_only(recipe.target)["num_sinks"] == recipe.target["num_sinks"]


def test_hybrid_and_control_read_the_same_tokens_in_the_same_order(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    for module in (AlignmentModule, DistillModule):
        step = module.training_step

        def recording(self, batch, batch_idx, step=step):
            read.append(batch.input_ids.clone())
            return step(self, batch, batch_idx)

        monkeypatch.setattr(module, "training_step", recording)
    teacher = memzoo.load(str(source))
    target = {"type": "lolcats", "window_size": 8, "num_sinks": 1, "feature_dim": 4}
    recipe = ConversionRecipe(target=target, seq_len=24, align_steps=2, tune_steps=3, lora_rank=1)
    options = {"progress": False, "accelerator": "cpu"}
    hybrid = run_recipe(teacher, str(source), recipe, **options)
    of_hybrid = list(read)
    read.clear()
    control = run_control(teacher, str(source), recipe, hybrid.num_trained, **options)
    assert torch.equal(torch.cat(of_hybrid), torch.cat(read))
    assert len({tuple(row.tolist()) for row in torch.cat(read)}) == 5  # nothing is read twice
    readings = TeacherReadings()
    run_recipe(teacher, str(source), recipe, **options, readings=readings)
    again = run_control(teacher, str(source), recipe, hybrid.num_trained, **options, readings=readings)
    for name, tensor in control.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("align", "tune", "scale"), [(1, 0, 1.0), (0, 1, 1.0), (0, 1, 0.0)])
def test_only_numbers_that_were_trained_are_counted(
    source: Path, align: int, tune: int, scale: float
) -> None:
    teacher = memzoo.load(str(source))
    recipe = ConversionRecipe(
        target={"type": "lolcats", "window_size": 8, "feature_dim": 4},
        seq_len=24,
        align_steps=align,
        tune_steps=tune,
        new_lr_scale=scale,
        lora_rank=1,
    )
    found = run_recipe(teacher, str(source), recipe, progress=False, accelerator="cpu")
    untrained, _ = convert_mixers(teacher, recipe.target)
    new = sum(untrained.state_dict()[name].numel() for name in found.report.new_parameters)
    low_rank = 2 * 2 * (4 * 16 - 8)  # per layer: q and o map 16 to 16, k and v 16 to 8
    expected = (new if align or scale else 0) + (low_rank if tune else 0)
    assert found.num_trained == expected


def test_the_bundled_text_is_read_only_where_nothing_else_is_named() -> None:
    assert ConversionRecipe().texts == ("state_of_the_union",)
    assert ConversionRecipe(files=["mine.txt"]).texts == ()
