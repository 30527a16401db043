"""The Python examples of the README: one runs as it stands, the other names what exists."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import memzoo
from memzoo.layers import list_mixers

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


def test_the_convert_example_names_what_exists() -> None:
    (example,) = [block for block in python_blocks() if "memzoo.convert" in block]
    compile(example, "README", "exec")
    assert list(inspect.signature(memzoo.convert).parameters)[:3] == ["source", "output", "recipe"]
    assert 'recipe="lolcats"' in example


def test_the_table_names_registered_mixers() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").split("\n") if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)} & set(list_mixers())
    assert listed == set(list_mixers()), sorted(set(list_mixers()) - listed)
