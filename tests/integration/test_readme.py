"""The Python examples of the README run, on small models in the place of the large ones."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memzoo
from memzoo import cli
from memzoo.layers import list_mixers
from memzoo.models.checkpoints.folder import export_llama_folder
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_import_example_runs_and_is_exact(tmp_path: Path) -> None:
    (example,) = [block for block in python_blocks() if "build_mixer" in block]
    script = tmp_path / "example.py"
    check = """
both = torch.cat([torch.randn(2, 100, 64), torch.randn(2, 7, 64)], dim=1)
whole, _ = block(both)
head, carried = block(both[:, :93])
tail, _ = block(both[:, 93:], carried)
assert torch.allclose(torch.cat([head, tail], dim=1), whole, atol=1e-5)
"""
    script.write_text(example + check, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def small_model() -> MemoryLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257,
        d_model=16,
        layers={"type": "attention"},
        num_layers=2,
        mixer_defaults={"num_heads": 2},
        mlp={"type": "swiglu", "d_ff": 24},
    )
    return MemoryLM(config)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which "smollm2-135m" is a small model of bytes."""
    monkeypatch.chdir(tmp_path)
    memzoo.save(small_model(), "teacher", "bytes")
    monkeypatch.setattr("memzoo.models.checkpoints.fetch.fetch_smollm2", lambda: tmp_path / "teacher")
    return tmp_path


def executed(example: str) -> dict[str, Any]:
    """What a script leaves behind."""
    Path("example.py").write_text(example, encoding="utf-8")
    return runpy.run_path("example.py")


RECIPE = """
target: {type: lolcats, window_size: 16, num_sinks: 2, feature_dim: 4}
stages:
  - {name: align, loss: {mixer_out: 1.0}, train: new, steps: 1, lr: 0.01, seq_len: 48}
  - {name: tune, loss: {kl: 1}, train: lora, steps: 1, lr: 0.001, seq_len: 48, lora_rank: 2, new_lr_scale: 10}
"""


def test_the_convert_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in python_blocks() if "memzoo.convert" in block]
    (workplace / "recipe.yaml").write_text(RECIPE)
    assert 'recipe="lolcats"' in example
    small = 'recipe="recipe.yaml", num_windows=2, accelerator="cpu"'
    found = executed(example.replace('recipe="lolcats"', small))
    assert isinstance(found["model"], MemoryLM)
    shown = capsys.readouterr().out
    for row in ("teacher", "control", "hybrid", "memory branch off"):
        assert row in shown


def test_the_save_example_runs(workplace: Path) -> None:
    (example,) = [block for block in python_blocks() if "memzoo.save" in block]
    executed(example)
    ids = torch.arange(9)[None]
    expected = memzoo.load("teacher", dtype=torch.bfloat16)(ids).logits
    assert torch.equal(memzoo.load("runs/smollm2")(ids).logits, expected)
    command = ["generate", "--model", "runs/smollm2", "--dtype", "bfloat16", "--prompt", "x"]
    assert cli.main([*command, "--max_new_tokens", "2"]) == 0


def test_the_swap_example_runs(workplace: Path) -> None:
    (example,) = [block for block in python_blocks() if "memzoo.swap" in block]
    export_llama_folder(small_model(), "a/llama/folder")
    found = executed(example)
    made = found["model"].generate(torch.arange(5)[None], max_new_tokens=3, pad_token_id=0)
    assert made.shape == (1, 8)


def test_save_keeps_what_is_there_and_names_mistakes(workplace: Path) -> None:
    model, other = small_model(), small_model()
    with torch.no_grad():
        other.norm.weight.mul_(2)
    memzoo.save(model, "mine")
    with pytest.raises(ValueError, match="'mine' already"):
        memzoo.save(other, "mine")
    with pytest.raises(ValueError, match="no tokenizer at 'nowhere'"):
        memzoo.save(other, "mine", "nowhere", overwrite=True)
    assert torch.equal(memzoo.load("mine").norm.weight, model.norm.weight)
    memzoo.save(other, "mine", overwrite=True)
    assert torch.equal(memzoo.load("mine").norm.weight, other.norm.weight)
    (workplace / "file").write_text("")
    with pytest.raises(ValueError, match="results cannot be written to 'file'"):
        memzoo.save(model, "file")


def test_the_table_names_registered_mixers() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").split("\n") if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)} & set(list_mixers())
    assert listed == set(list_mixers()), sorted(set(list_mixers()) - listed)
