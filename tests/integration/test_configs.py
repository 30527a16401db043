"""Every shipped configuration parses, builds and trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memzoo import cli, configs
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.records import read_record
from memzoo.train.data.tokenizers import byte_tokenizer
from memzoo.train.inspection import inspect_model
from memzoo.train.lightning_cli import TrainCLI

MODELS = [name for name in configs.names() if name.startswith("models/")]
RUNS = [name for name in configs.names() if name.startswith("train/")]
SMALL = {
    "chat": {"files": ["talks.jsonl"], "seq_len": 64, "batch_size": 2},
    "mqar": {
        "train_segments": [{"input_seq_len": 64, "num_kv_pairs": 4, "num_examples": 24}],
        "batch_size": 8,
    },
    "stream": {
        "dataset": {"path": "json", "data_files": "rows.jsonl"},
        "val_dataset": {"path": "json", "data_files": "rows.jsonl", "split": "train", "max_rows": 5},
        "seq_len": 64,
        "batch_size": 2,
        "batches_per_epoch": 3,
        "max_val_windows": 2,
        "shuffle_buffer": 4,
    },
    "task": {
        "train_lengths": [32],
        "eval_lengths": [32, 64],
        "num_batches": 3,
        "num_eval_examples": 4,
        "batch_size": 4,
    },
    "text": {"seq_len": 64, "batch_size": 2, "max_val_windows": 2},
}


def test_there_are_configurations_of_both_kinds() -> None:
    assert len(MODELS) >= 4
    assert {"train/mqar_based", "train/mqar_window", "train/needle_based", "train/text_small"} <= set(RUNS)
    assert all(configs.summary(name).endswith(".") for name in configs.names())


@pytest.mark.parametrize("name", RUNS)
def test_runs_log_where_the_command_puts_them(name: str) -> None:
    assert "logger" not in yaml.safe_load(configs.find(name).read_text())["trainer"]


@pytest.mark.parametrize("name", MODELS)
def test_models_build_on_the_meta_device(name: str) -> None:
    config = ModelConfig.from_dict(yaml.safe_load(configs.find(name).read_text()))
    assert ModelConfig.from_dict(config.to_dict()) == config
    model = MemoryLM(config, device="meta")
    rows = inspect_model(config, num_tokens=1000)
    assert rows[-1].num_parameters == model.num_parameters()
    assert rows[-1].flops_per_token == model.flops_per_token(1000)


REDUCED = {
    "vocab_size": 97,
    "d_model": 64,
    "num_layers": 2,
    "repeat": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_value_heads": 8,
    "head_dim": 16,
    "feature_dim": 4,
    "window_size": 8,
    "num_sinks": 2,
    "chunk_size": 8,
    "fast_heads": 2,
    "low_rank": 4,
    "mem_dim": 32,
    "d_ff": 96,
}


def reduced(content: object) -> object:
    """A model config with the same layers, but narrow and short."""
    if isinstance(content, dict):
        return {key: REDUCED.get(key, reduced(value)) for key, value in content.items()}
    return [reduced(item) for item in content] if isinstance(content, list) else content


@pytest.mark.parametrize("name", MODELS)
def test_models_train_three_steps_at_reduced_size(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(reduced(yaml.safe_load(configs.find(name).read_text())))
    model = MemoryLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    tokens = torch.randint(0, 97, (2, 25), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    assert losses[3] < 0.95 * losses[0], losses


@pytest.mark.parametrize(
    "name, millions",
    [
        ("models/based_360m", 363),
        ("models/based_1b", 1349),
        ("models/attention_360m", 360),
        ("models/retnet_1b", 1324),
        ("models/gated_delta_net_1b", 1322),
        ("models/allmem_600m", 662),
        ("models/lact_760m", 798),
        ("models/bmojo_130m", 122),
        ("models/bmojo_370m", 379),
        ("models/bmojo_790m", 826),
        ("models/bmojo_1b", 1446),
        ("models/titans_mac", 386),
        ("models/titans_mag", 386),
        ("models/titans_mal", 386),
    ],
)
def test_models_have_the_size_of_their_name(name: str, millions: int) -> None:
    config = ModelConfig.from_dict(yaml.safe_load(configs.find(name).read_text()))
    assert round(MemoryLM(config, device="meta").num_parameters() / 1e6) == millions


def test_the_shipped_evaluation_measures_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MemoryLM(ModelConfig(vocab_size=257, d_model=8, layers=[{"type": "based", "num_heads": 1}]))
    save_model(model, tmp_path / "model", byte_tokenizer())
    small = ["--window_size", "40", "--num_windows", "3", "--output", "record.json"]
    assert cli.main(["evaluate", "perplexity", "--config", "evaluate/book", "--model", "model", *small]) == 0
    record = read_record("record.json")
    assert record["config"]["text"] == "moby_dick"
    assert record["results"]["starts"] == [8192, 8232, 8272]


@pytest.mark.parametrize("name", RUNS)
def test_runs_train_three_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "a story " * n}) for n in range(20)))
    talk = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    (tmp_path / "talks.jsonl").write_text("\n".join([json.dumps(talk)] * 12))
    content = yaml.safe_load(configs.find(name).read_text())
    small = [f"--data.{key}={json.dumps(value)}" for key, value in SMALL[content["data"]["type"]].items()]
    run = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    if "val_check_interval" in content["trainer"]:
        run.append("--trainer.val_check_interval=3")
    assert cli.main(["train", "fit", "--config", name, *small, *run, "--output", "model"]) == 0
    assert (tmp_path / "model" / "config.json").is_file()
    assert list(tmp_path.glob("runs/*/version_0/metrics.csv"))
    assert list(tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt"))
    assert list(tmp_path.glob("runs/*/version_0/events.out.tfevents.*"))


def test_a_small_text_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 200)
    own = ["--data.texts", "[]", "--data.val_texts", "[]", "--data.files", "book.txt", "--data.seq_len", "32"]
    run = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--output", "model"]
    assert cli.main(["train", "fit", "--config", "train/text_small", *own, *run]) == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'train/mqar_based'"):
        configs.find("train/mqar_bsed")


# ---------------------------------------------------------------- import paths

EVIL = "{class_path: planted.Module}"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that leaves a trace when anything imports it."""
    trace = tmp_path / "imported"
    (tmp_path / "planted.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from lightning.pytorch import Callback\n"
        "class Module: pass\n"
        "class Watch(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.chdir(tmp_path)
    return trace


ATTACKS = [
    "{model: planted.Module}",
    "{model: {class_path: planted.Module}}",
    "{model: {config: planted.Module}}",
    "{model: {config: {class_path: planted.Module}}}",
    "{model: {optimizer: planted.Module}}",
    "{model: {config: {layers: [{class_path: planted.Module}]}}}",
    "{model: {config: {layers: [{type: based, num_heads: {class_path: planted.Module}}]}}}",
    "{model: {config: {mixer_defaults: {num_heads: {class_path: planted.Module}}}}}",
    "{model: {config: {mixer_defaults: '{num_heads: {class_path: planted.Module}}'}}}",
    r"""{model: {config: {mixer_defaults: '{num_heads: {"cl\x61ss_path": planted.Module}}'}}}""",
    "{model: {config: {mlp: {class_path: planted.Module}}}}",
    "{data: planted.Module}",
    "{data: {class_path: planted.Module}}",
    "{data: {type: planted.Module}}",
    "{data: {train_segments: [planted.Module]}}",
    "{data: {type: text, dataset: planted.Module}}",
    "{data: {type: text, dataset: {class_path: planted.Module}}}",
    "{data: {type: text, dataset: {path: planted.Module, data_files: {class_path: planted.Module}}}}",
    "{data: {type: stream, dataset: '{class_path: planted.Module}'}}",
    "{data: {train_segments: '[planted.Module]'}}",
    "{data: {train_segments: [{class_path: planted.Module}]}}",
    "{data: {batch_size: {class_path: planted.Module}}}",
    "{trainer: planted.yaml}",
    "{trainer: {plugins: planted.Module}}",
    "{trainer: {plugins: [planted.Module]}}",
    "{trainer: {profiler: planted.Module}}",
    "{trainer: {profiler: {class_path: planted.Module}}}",
    "{trainer: {accelerator: {class_path: planted.Module}}}",
    "{output: {class_path: planted.Module}}",
    "{class_path: planted.Module}",
]
FLAGS = [
    ["--model", "planted.Module"],
    ["--model.config", "planted.Module"],
    ["--model.config.class_path=planted.Module"],
    ["--model.config", EVIL],
    ["--model.config.layers+", EVIL],
    ["--data.train_segments+", "planted.Module"],
    ["--data.type=text", "--data.dataset", "planted.Module"],
    ["--data.type=text", "--data.dataset.class_path", "planted.Module"],
    ["--data.train_segments+=planted.Module"],
    ["--trainer.profiler", "planted.Module"],
    ["--trainer.profiler.help", "planted.Module"],
    ["--trainer", "{profiler: planted.Module}"],
    ["--config", EVIL],
]


@pytest.mark.parametrize("content", ATTACKS)
def test_files_cannot_name_import_paths(content: str, planted: Path) -> None:
    (planted.parent / "attack.yaml").write_text(content)
    assert cli.main(["train", "fit", "--config", "train/mqar_based", "--config", "attack.yaml"]) == 2
    assert not planted.exists()


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_flags_cannot_name_import_paths(flags: list[str], planted: Path) -> None:
    assert cli.main(["train", "fit", "--config", "train/mqar_based", *flags]) == 2
    assert not planted.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--mixer", "based", "--settings", EVIL],
        ["bench", "--mixer", "based", "--settings", "{num_heads: {class_path: planted.Module}}"],
        ["bench", "--mixer", "parallel", "--settings", "{mixers: [{type: {class_path: planted.Module}}]}"],
        ["bench", "--mixer", "parallel", "--settings", "{mixers: [{class_path: planted.Module}]}"],
        ["bench", "--mixer", "planted.Module"],
        ["generate", "--model", "planted.Module", "--prompt", "x"],
        ["inspect", "--model", EVIL],
    ],
    ids=" ".join,
)
def test_other_commands_cannot_name_import_paths(arguments: list[str], planted: Path) -> None:
    assert cli.main(arguments) == 2
    assert not planted.exists()


def test_callbacks_of_the_users_own_are_accepted(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace works, and the three places that may name classes do."""
    (planted.parent / "own.yaml").write_text("{trainer: {callbacks: [{class_path: planted.Watch}]}}")
    monkeypatch.setattr(TrainCLI, "_run_subcommand", lambda self, name: None)
    made = TrainCLI(configs.with_files(["fit", "--config", "train/mqar_based", "--config", "own.yaml"]))
    assert planted.exists()
    assert "Watch" in [type(callback).__name__ for callback in made.trainer.callbacks]


def test_a_checkpoint_cannot_change_what_is_built(planted: Path) -> None:
    checkpoint = planted.parent / "evil.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "planted.Module"}, "state_dict": {}}, checkpoint)
    arguments = ["train", "validate", "--config", "train/mqar_based", "--ckpt_path", str(checkpoint)]
    with pytest.raises(Exception):  # noqa: B017  # whatever Lightning says of a checkpoint without weights
        cli.main(["--debug", *arguments, "--data.eval_batch_size=2", "--trainer.logger=false"])
    assert not planted.exists()
