"""The command line from end to end: train, resume, evaluate, inspect, generate; mistakes and attacks."""

from __future__ import annotations

import csv
import errno
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import memzoo
from memzoo import cli
from memzoo.models.checkpoints.folder import load_model
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.records import read_record
from memzoo.train.checkpointing import newest_checkpoint
from memzoo.train.command_line import with_values
from memzoo.train.data.tokenizers import byte_tokenizer

RECALL = {
    "model": {
        "config": {
            "vocab_size": 64,
            "d_model": 16,
            "layers": [
                {"type": "sliding_window", "window_size": 4, "num_heads": 2},
                {"type": "based", "feature_dim": 4, "num_heads": 2},
            ],
        },
        "optimizer": {"lr": 0.01, "warmup_steps": 2},
    },
    "data": {
        "type": "mqar",
        "vocab_size": 64,
        "batch_size": 8,
        "train_segments": [{"input_seq_len": 32, "num_kv_pairs": 4, "num_examples": 64}],
        "eval_segments": [{"input_seq_len": 32, "num_kv_pairs": 4, "num_examples": 20}],
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which `recall.yaml` describes a small run."""
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler keeps the stderr of the test that imported it, which is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "runs"), "name": "recall"},
    }
    content = RECALL | {"trainer": RECALL["trainer"] | {"logger": logger}}
    (tmp_path / "recall.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def run(*arguments: str, status: int = 0) -> None:
    assert cli.main(list(arguments)) == status


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake prints."""
    capsys.readouterr()
    run(*arguments, status=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("memzoo: error: ")
    return lines[0]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from memzoo import cli; cli.main(['--help']); "
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    places = [str(Path(cli.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("command", ["inspect", "generate", "list", "bench"])
def test_every_command_explains_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: memzoo {command}" in shown
    assert "--config" in shown


def test_the_help_of_tasks_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "task", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("associative_retrieval", "needle_text"))


HELP_SECONDS = """
import contextlib, io, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
from memzoo import cli
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    cli.main(sys.argv[1:])
print(time.perf_counter() - start, torch_seconds, "lightning" in sys.modules, "transformers" in sys.modules)
print(shown.getvalue())
"""


@pytest.mark.parametrize("arguments", [("train", "--help"), ("convert", "--help")], ids=" ".join)
def test_help_is_quick(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_SECONDS, *arguments], capture_output=True, text=True, check=True
    )
    figures, shown = done.stdout.split("\n", 1)
    seconds, torch_seconds, *heavy = figures.split()
    assert heavy == ["False", "False"]
    # a busy machine slows the import of torch alike
    assert float(seconds) < max(3.0, 2 * float(torch_seconds)), figures
    assert f"usage: memzoo {arguments[0]}" in shown


def test_an_interrupted_run_says_what_is_left(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train import lightning_cli, modules
    from memzoo.train.data import mqar_module

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def stopped() -> str:
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGINT)
        run("train", "fit", "--config", "recall.yaml", "--trainer.callbacks", json.dumps([kept]), status=130)
        assert signal.getsignal(signal.SIGINT) is handler
        return capsys.readouterr().err.splitlines()[-1]

    kept = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "kept", "every_n_train_steps": 5, "save_top_k": -1},
    }
    with monkeypatch.context() as patch:
        patch.setattr(lightning_cli, "refuse_imports", interrupted)
        assert stopped() == "memzoo: interrupted before the first step; nothing was written"
        assert not (workplace / "runs").exists()
    with monkeypatch.context() as patch:
        patch.setattr(mqar_module.MQARDataModule, "setup", interrupted)
        assert stopped() == "memzoo: interrupted before the first step; no model was written"
    step = modules.LanguageModelModule.training_step
    for last, left in ((3, "there is no checkpoint"), (6, "--ckpt_path")):
        with monkeypatch.context() as patch:
            patch.setattr(
                modules.LanguageModelModule,
                "training_step",
                lambda self, batch, index, last=last: (
                    interrupted() if self.trainer.global_step == last else step(self, batch, index)
                ),
            )
            line = stopped()
            assert line.startswith(f"memzoo: interrupted after step {last}; no model was written")
            assert left in line
    assert line.endswith("step=5.ckpt")
    assert newest_checkpoint(workplace / "kept") == Path(line.split()[-1])


def test_train_then_use_the_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "fit", "--config", "recall.yaml")
    folder = workplace / "runs" / "recall" / "version_0" / "model"
    saved = yaml.safe_load((folder.parent / "config.yaml").read_text())
    assert saved["data"]["type"] == "mqar"
    assert saved["model"]["optimizer"]["beta2"] == 0.95, "defaults are written out"

    capsys.readouterr()
    task = ["--vocab_size", "64", "--input_seq_len", "32", "--num_kv_pairs", "4", "--num_examples", "10"]
    run("evaluate", "mqar", "--model", str(folder), *task, "--output", "recall.json")
    record = read_record("recall.json")
    assert 0 <= record["results"]["accuracy"] <= 1
    assert f"accuracy {record['results']['accuracy']:.4f}" in capsys.readouterr().out

    run("inspect", "--model", str(folder), "--num_tokens", "100")
    shown = capsys.readouterr().out
    model = load_model(folder)
    assert f"{model.num_parameters():,}" in shown
    assert f"{model.flops_per_token(100):,}" in shown


def test_the_saved_config_repeats_the_run(workplace: Path) -> None:
    run("train", "fit", "--config", "recall.yaml", "--output", "first")
    saved = workplace / "runs" / "recall" / "version_0" / "config.yaml"
    run("train", "fit", "--config", str(saved), "--output", "second")
    first, second = load_model("first").state_dict(), load_model("second").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_run_resumes_bit_for_bit(workplace: Path) -> None:
    run("train", "fit", "--config", "recall.yaml", "--output", "whole")
    checkpointing = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "kept", "every_n_train_steps": 5, "save_top_k": -1},
    }
    run("train", "fit", "--config", "recall.yaml", "--trainer.callbacks", json.dumps([checkpointing]))
    (middle,) = (workplace / "kept").glob("*step=5.ckpt")
    run("train", "fit", "--config", "recall.yaml", "--ckpt_path", str(middle), "--output", "resumed")
    whole, resumed = load_model("whole").state_dict(), load_model("resumed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_says_where_its_model_is_and_can_go_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    run("train", "fit", "--config", "recall.yaml", "--trainer.max_epochs", "1")
    folder = workplace / "runs" / "recall" / "version_0"
    assert capsys.readouterr().out.splitlines()[-1] == f"model written to {folder / 'model'}"
    last = folder / "checkpoints" / "last.ckpt"
    run("train", "fit", "--config", "recall.yaml", "--ckpt_path", str(last), "--output", "longer")
    assert capsys.readouterr().out.splitlines()[-1] == "model written to longer"
    assert not [warning for warning in recwarn if "dirpath" in str(warning.message)]
    first, longer = load_model(folder / "model").state_dict(), load_model("longer").state_dict()
    assert any(not torch.equal(first[name], longer[name]) for name in first)


def test_a_run_stopped_by_a_signal_goes_on_from_its_folder(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train.modules import LanguageModelModule

    step = LanguageModelModule.training_step

    def signalled(self, batch, index):
        if self.trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelModule, "training_step", signalled)
        run("train", "fit", "--config", "recall.yaml", "--data.num_workers", "2", status=143)
    folder = workplace / "runs" / "recall"
    last = folder / "version_0" / "checkpoints" / "last.ckpt"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memzoo: stopped by SIGTERM after step 11; no model was written. Go on from")
    assert line.endswith(f"--ckpt_path {last}")
    run("train", "fit", "--config", "recall.yaml", "--ckpt_path", str(folder), "--output", "resumed")
    run("train", "fit", "--config", "recall.yaml", "--output", "whole")
    whole, resumed = load_model("whole").state_dict(), load_model("resumed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for subcommand in ("validate", "test"):
        run("train", subcommand, "--config", "recall.yaml", "--ckpt_path", str(last))


@pytest.mark.parametrize(
    "name, line, is_kept",
    [
        ("utilities.rank_zero", "GPU available: False, used: False", False),
        ("utilities.rank_zero", "GPU available: True (cuda), used: True", True),
        ("utilities.rank_zero", "`Trainer.fit` stopped: `max_steps=20` reached.", False),
        ("utilities.rank_zero", "Restoring states from the checkpoint path at last.ckpt", True),
        (
            "trainer.connectors.checkpoint_connector",
            "`weights_only` was not set, defaulting to `False`.",
            False,
        ),
    ],
)
def test_lines_that_ask_for_nothing_are_not_shown(name: str, line: str, is_kept: bool) -> None:
    run("list", "--what", "kernels")
    log = logging.getLogger(f"lightning.pytorch.{name}")
    record = log.makeRecord(log.name, logging.INFO, "file", 1, line, (), None)
    assert bool(log.filter(record)) is is_kept


def test_a_run_logs_to_a_table_and_to_tensorboard_unless_told_otherwise(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((workplace / "recall.yaml").read_text())
    del content["trainer"]["logger"]
    (workplace / "short.yaml").write_text(yaml.safe_dump(content | {"trainer": content["trainer"]}))
    short = ("--trainer.max_epochs", "1")
    missing = fails(capsys, "train", "fit", "--config", "short.yaml", "--ckpt_path", "last")
    assert "the checkpoint 'runs/short' does not exist" in missing
    run("train", "fit", "--config", "short.yaml", *short)
    assert "preflight: 3,888 parameters" in capsys.readouterr().err
    folder = workplace / "runs" / "short" / "version_0"
    saved = folder / "config.yaml"
    run("train", "fit", "--config", str(saved), "--ckpt_path", "last", "--trainer.max_epochs", "2")
    second = workplace / "runs" / "short" / "version_1"
    for place, steps in ((folder, range(8)), (second, range(8, 16))):
        assert len(list(place.glob("events.out.tfevents.*"))) == 1
        with (place / "metrics.csv").open(newline="") as file:
            logged = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
        assert logged == list(steps), "every step, and no step twice"
        assert {path.name for path in place.iterdir()} >= {"config.yaml", "checkpoints", "model"}
    capsys.readouterr()
    run("train", "fit", "--config", "short.yaml", *short, "--trainer.logger", "false", "--preflight", "false")
    assert "preflight" not in capsys.readouterr().err
    assert not (workplace / "runs" / "short" / "version_2").exists()


def test_a_run_without_its_last_checkpoint_ends_with_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.models import hf
    from memzoo.train import checkpointing

    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpointing, "write_folder", full)
    run("train", "fit", "--config", "recall.yaml", "--output", "trained", status=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memzoo: error: the last checkpoint is missing: ")
    assert "No space left on device" in line
    assert load_model("trained"), "the model itself is there"
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(hf, "save_model", full)
    run("train", "fit", "--config", "recall.yaml", "--output", "lost", status=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memzoo: error: the model could not be written to lost (No space left on device)")
    assert line.endswith("version_1/checkpoints/last.ckpt")


def test_a_place_for_logs_that_cannot_be_written_is_found_before_the_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((workplace / "recall.yaml").read_text())
    del content["trainer"]["logger"]
    (workplace / "short.yaml").write_text(yaml.safe_dump(content))
    (workplace / "file").touch()
    message = fails(capsys, "train", "fit", "--config", "short.yaml", "--trainer.default_root_dir", "file")
    assert "'file/short'" in message
    assert "Name another folder" in message


def test_a_run_interrupted_in_its_second_epoch_goes_on_from_last_ckpt(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train.modules import LanguageModelModule

    step = LanguageModelModule.training_step

    def stopping(self, batch, index):
        if self.trainer.global_step == 10:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelModule, "training_step", stopping)
        run("train", "fit", "--config", "recall.yaml", status=130)
    last = workplace / "runs" / "recall" / "version_0" / "checkpoints" / "last.ckpt"
    run("train", "fit", "--config", "recall.yaml", "--ckpt_path", str(last), "--output", "resumed")
    run("train", "fit", "--config", "recall.yaml", "--output", "whole")
    whole, resumed = load_model("whole").state_dict(), load_model("resumed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_is_looked_for_before_any_work(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train.lightning_cli import TrainCLI

    monkeypatch.setattr(TrainCLI, "instantiate_classes", lambda self: pytest.fail("work was begun"))
    (workplace / "kept").mkdir()
    (workplace / "kept" / "epoch=1.ckpt").write_text("")
    config = ("--config", "recall.yaml")
    for subcommand in ("validate", "test"):
        assert "--ckpt_path" in fails(capsys, "train", subcommand, *config)
        assert "random weights" in fails(capsys, "train", subcommand, *config)
    for subcommand in ("fit", "validate", "test"):
        for given in ("kept/last.ckpt", "kept"):
            assert "There are kept/epoch=1.ckpt." in fails(
                capsys, "train", subcommand, *config, "--ckpt_path", given
            )
        assert "no .ckpt in 'runs'" in fails(
            capsys, "train", subcommand, *config, "--ckpt_path", "runs/x.ckpt"
        )


def test_a_trained_model_is_not_replaced_unasked(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train.lightning_cli import TrainCLI

    run("train", "fit", "--config", "recall.yaml", "--trainer.max_steps", "1", "--output", "mine")
    before = load_model("mine").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(TrainCLI, "instantiate_classes", lambda self: pytest.fail("work was begun"))
        assert "'mine' already" in fails(
            capsys, "train", "fit", "--config", "recall.yaml", "--output", "mine"
        )
    again = ["--config", "recall.yaml", "--trainer.max_steps", "2", "--output", "mine", "--overwrite"]
    run("train", "fit", *again)
    after = load_model("mine").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    saved = yaml.safe_load((workplace / "runs" / "recall" / "version_1" / "config.yaml").read_text())
    assert saved["output"] == "mine"
    assert saved["overwrite"] is False


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["a.txt"], '["a.txt"]'),
        (["a.txt", "b.txt"], '["a.txt", "b.txt"]'),
        (["[a.txt,", "b.txt]"], "[a.txt, b.txt]"),
        (["[]"], "[]"),
    ],
)
def test_files_are_given_as_in_a_shell(given: list[str], read: str) -> None:
    types = {"files": Sequence[str] | str, "seq_len": int}
    line = ["fit", "--data.files", *given, "--data.seq_len", "8", "--overwrite"]
    expected = ["fit", f"--data.files={read}", "--data.seq_len", "8", "--overwrite=true"]
    assert with_values(line, types) == expected
    assert with_values(["fit", f"--data.files={given[0]}"], types)[1].startswith("--data.files=[")


def test_text_from_training_to_generation(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    config = yaml.safe_load((workplace / "recall.yaml").read_text())
    config["model"]["config"]["vocab_size"] = 257
    config["data"] = {
        "type": "text",
        "files": [],
        "seq_len": 32,
        "batch_size": 4,
        "val_fraction": 0.2,
    }
    config["trainer"] |= {"max_steps": 3, "max_epochs": None}
    (workplace / "text.yaml").write_text(yaml.safe_dump(config))
    run("train", "fit", "--config", "text.yaml", "--data.files", "book.txt", "--output", "tiny")
    last = str(workplace / "runs" / "recall" / "version_0" / "checkpoints" / "last.ckpt")
    run("train", "validate", "--config", "text.yaml", "--data.files=book.txt", "--ckpt_path", last)
    capsys.readouterr()

    run("generate", "--model", "tiny", "--prompt", "It was", "--max_new_tokens", "5")
    assert capsys.readouterr().out.endswith("\n")
    measure = ["--model", "tiny", "--text", "book.txt", "--window_size", "100", "--num_windows", "4"]
    run("evaluate", "perplexity", *measure, "--output", "a.json")
    run("evaluate", "perplexity", *measure, "--chunk_size", "7", "--output", "b.json")
    a, b = read_record("a.json")["results"], read_record("b.json")["results"]
    assert a["window_losses"] == pytest.approx(b["window_losses"], abs=1e-5), "chunks change no number"
    assert [part["first"] for part in a["by_position"]] == [0, 64]
    capsys.readouterr()
    run("evaluate", "compare", "--a", "a.json", "--b", "b.json")
    shown = capsys.readouterr().out
    assert "over 4 windows" in shown
    assert "below 0, a is better" in shown


def test_speed_and_a_page_of_several_models(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mixer in ("attention", "based"):
        config = ModelConfig(vocab_size=257, d_model=8, layers=[{"type": mixer, "num_heads": 1}])
        save_model(MemoryLM(config), mixer, byte_tokenizer())
    (workplace / "book.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    run("evaluate", "speed", "--model", "based", "--lengths", "16", "40", "--output", "speed.json")
    record = read_record("speed.json")
    assert [row["length"] for row in record["results"]["lengths"]] == [16, 40]
    assert record["config"]["threads"] >= 1
    assert "written tokens/s" in capsys.readouterr().out
    (workplace / "all.yaml").write_text(
        "perplexity:\n"
        "  - {text: book.txt, window_size: 100, num_windows: 2}\n"
        "  - {text: book.txt, window_size: 300, num_windows: null}\n"
        "speed: [{lengths: [16, 40], repetitions: 1}]\n"
        "task: [{task: copying, lengths: [32, 64], num_examples: 4, settings: {num_tokens: 4}}]\n"
    )
    every = ("evaluate", "all", "--config", "all.yaml", "--models", "attention", "based", "--output", "out")
    run(*every)
    assert len(list((workplace / "out").glob("*.json"))) == 8
    page = (workplace / "out" / "page.html").read_text()
    assert page.count("<img") == 2 + 4 + 2
    assert "page written to out/page.html" in capsys.readouterr().out
    assert "--overwrite" in fails(capsys, *every)
    run(*every, "--overwrite")
    for message, line in (
        (
            "perplexity has no setting 'windwo_size'. Did you mean 'window_size'?",
            "perplexity: [{windwo_size: 3}]",
        ),
        ("window_size", "perplexity: [{window_size: few}]"),
        ("there is nothing to measure", "title: x"),
    ):
        (workplace / "wrong.yaml").write_text(line)
        assert message in fails(
            capsys, "evaluate", "all", "--config", "wrong.yaml", "--models", "based", "--output", "new"
        )
    assert "'nowhere' does not exist" in fails(capsys, *every[:4], "--models", "nowhere", "--output", "new")
    assert not (workplace / "new").exists()


def test_print_config_can_be_read_back(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "fit", "--config", "recall.yaml", "--data.batch_size", "4", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["batch_size"] == 4
    assert printed["model"]["config"]["layers"] == RECALL["model"]["config"]["layers"]
    (workplace / "printed.yaml").write_text(yaml.safe_dump(printed))
    run("train", "fit", "--config", "printed.yaml", "--trainer.max_steps", "1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "fti"], "Did you mean 'fit'?"),
        (["train", "--config", "recall.yaml"], "memzoo train knows no '--config'. Choose one of fit"),
        (["train", "fit"], "Give --config with a YAML file or a name. Shipped ones are train/chat_small"),
        (["train", "fit", "--data.type", "mqar"], "Give --config"),
        (["train", "fit", "--config", "missing.yaml"], "there is no configuration file 'missing.yaml'"),
        (["train", "fit", "--config", "nope.yaml"], "Shipped ones are train/chat_small, train/mqar_based"),
        (["train", "fit", "--config", "mqar_based.yml"], "Did you mean 'train/mqar_based'?"),
        (["train", "fit", "--config", "nope"], "Shipped ones are train/chat_small, train/mqar_based"),
        (["train", "fit", "--config", "mqar_windw"], "Did you mean 'train/mqar_window'?"),
        (["evaluate", "perplexity", "--config", "nope"], "Shipped ones are evaluate/book, evaluate/small."),
        (["train", "fit", "--config", "train/mqar_bsed"], "Did you mean 'train/mqar_based'?"),
        (["train", "fit", "--config", "recall.yaml", "--data.bacth_size", "3"], "Did you mean 'batch_size'?"),
        (["train", "fit", "--config", "recall.yaml", "--data.type", "mqr"], "Did you mean 'mqar'?"),
        (
            ["train", "fit", "--config", "recall.yaml", "--model.config.d_modle=3"],
            "Did you mean 'd_model'?",
        ),
        (
            ["train", "fit", "--config", "recall.yaml", "--trainer.max_stpes", "3"],
            "Did you mean 'max_steps'?",
        ),
        (["train", "fit", "--config", "recall.yaml", "--data.batch_size", "few"], "data.batch_size"),
        (
            ["train", "fit", "--config", "recall.yaml", "--data.batch_size", "0"],
            "batch_size must be at least 1",
        ),
        (
            ["train", "fit", "--config", "recall.yaml", "--model.config.d_model", "15"],
            "multiple of num_heads",
        ),
        (["inspect", "--modle", "x"], "Did you mean model?"),
        (["inspect", "--model", "nowhere"], "neither a file nor a shipped configuration"),
        (["inspect"], "model"),
        (["inspect", "--model", "train/mqar_based", "--num_tokens", "many"], "num_tokens"),
        (["evaluate", "perplxity"], "Did you mean 'perplexity'?"),
        (
            ["evaluate", "perplexity", "--model", "nowhere", "--tokenizer", "bytes"],
            "'nowhere' does not exist",
        ),
        (["generate", "--model", "nowhere", "--prompt", "x"], "'nowhere' does not exist"),
        (["evaluate", "compare", "--a", "a.json", "--b", "b.json"], "there is no record 'a.json'"),
        (["bench", "--mixer", "basde"], "Did you mean 'based'?"),
    ],
)
def test_mistakes_print_one_clean_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, *arguments)


def test_a_place_without_a_model_names_those_nearby(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("runs/a/version_0/model", "out/hybrid", "out/control"):
        (workplace / place).mkdir(parents=True)
        (workplace / place / "config.json").write_text("{}")
    (workplace / "runs/a/version_0/checkpoints").mkdir()
    (workplace / "runs/a/version_0/checkpoints/last.ckpt").write_bytes(b"\x80")
    (workplace / "empty").mkdir()
    for given, named in (
        ("runs/a/version_0/modle", "Did you mean 'runs/a/version_0/model'?"),
        ("runs/a/version_0", "Models lie in runs/a/version_0/model."),
        ("runs", "Models lie in runs/a/version_0/model."),
        ("runs/a/version_0/checkpoints/last.ckpt", "That of this run is 'runs/a/version_0/model'."),
        ("out", "Models lie in out/control, out/hybrid."),
        ("empty", "Give the folder of a model."),
    ):
        assert named in fails(capsys, "generate", "--model", given, "--prompt", "x")
        with pytest.raises(ValueError, match=re.escape(named)):
            memzoo.load(given)
    assert "Models lie in" in fails(capsys, "inspect", "--model", "out")
    assert "That of this run" in fails(capsys, "inspect", "--model", "runs/a/version_0/checkpoints/last.ckpt")
    assert "Models lie in" in fails(capsys, "evaluate", "perplexity", "--model", "out", "--text", "emma")
    assert "Models lie in" in fails(capsys, "evaluate", "mqar", "--model", "out")


def test_the_summary_of_a_command_is_a_sentence() -> None:
    for command in cli.COMMANDS.values():
        targets = [command.target] if isinstance(command.target, str) else list(command.target.values())
        for target in targets:
            lines = inspect.getdoc(cli._load(target)).split("\n")
            assert lines[0].endswith("."), target
            assert not any(lines[1:2]), target


def test_debug_shows_where(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trian"):
        cli.main(["--debug", "trian"])
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="trian"):
        cli.main(["trian"])


def test_list_and_bench(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    run("list")
    shown = capsys.readouterr().out
    for word in ("based", "moby_dick", "train/mqar_based", "linear_attention"):
        assert word in shown
    run("bench", "--mixer", "based", "--d_model", "8", "--lengths", "16", "--settings", "{num_heads: 2}")
    inner = "{fading_window_size: 4, mixers: [{type: gated_delta_net, num_heads: 2, head_dim: 4}]}"
    for mixer, settings in (("mamba2", "{head_dim: 8, rate_range: [0.01, 0.1]}"), ("bmojo", inner)):
        run("bench", "--mixer", mixer, "--d_model", "8", "--lengths", "16", "--settings", settings)
    sizes = ["--d_model", "8", "--lengths", "[16, 200]", "--settings", "{num_heads: 2}"]
    run("bench", "--mixer", "based", *sizes, "--output", "bench.json")
    figures = read_record("bench.json")["results"]["figures"]
    assert {(figure["mixer"], figure["num_tokens"]) for figure in figures} == {
        ("based", 16), ("attention", 16), ("based", 200), ("attention", 200)
    }  # fmt: skip
    bytes_of = {(figure["mixer"], figure["num_tokens"]): figure["state_num_bytes"] for figure in figures}
    assert bytes_of["based", 16] == bytes_of["based", 200]
    assert bytes_of["attention", 16] < bytes_of["attention", 200]


def test_results_that_cannot_be_written_are_named_before_the_work(workplace, capsys, monkeypatch):
    (workplace / "file").write_text("")
    run("train", "fit", "--config", "recall.yaml", "--output", "file", status=2)
    assert "results cannot be written to 'file'" in capsys.readouterr().err
    assert not list(workplace.glob("runs/recall/*/checkpoints"))
    model = ("--model", "no model is looked for")
    run("evaluate", "mqar", *model, "--output", "file/recall.json", status=2)
    assert "results cannot be written to 'file'" in capsys.readouterr().err
    run("evaluate", "perplexity", *model, "--text", "emma", "--output", str(workplace), status=2)
    assert "Name a .json file" in capsys.readouterr().err
    run("bench", "--mixer", "attention", "--output", "file/bench.json", status=2)
    assert "results cannot be written to 'file'" in capsys.readouterr().err
