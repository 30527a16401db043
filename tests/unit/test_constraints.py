"""The pinned versions are complete and lie within the ranges that the package declares."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[Requirement]:
    """Every direct dependency but those of the extra `cuda`, which is for machines that bring their own."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in extras if name != "cuda" for line in extras[name])]
    return [Requirement(line) for line in lines]


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    wrong = []
    for requirement in declared():
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or pin not in requirement.specifier:
            wrong.append(str(requirement))
    assert wrong == []


def test_torch_has_no_upper_bound() -> None:
    (torch,) = (requirement for requirement in declared() if requirement.name == "torch")
    assert "9999" in torch.specifier


def test_one_python_version_is_named_everywhere() -> None:
    least = PROJECT["requires-python"].removeprefix(">=")
    for name in ("README.md", "docs/getting-started.md", "Makefile"):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"Python (3\.\d+)", text)) == {least}, name
    assert f"sys.version_info < ({least.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    assert f"work together on Python {least}" in (ROOT / "constraints.txt").read_text()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py{least.replace('.', '')}"
