"""What a user installs: every module, configuration and text of the four code folders, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("configs", "kernels", "layers", "models", "train")
TEXTS = Path("train", "data", "texts")


def package_files() -> set[str]:
    """Names that the wheel must hold below memzoo/, read off the source tree."""
    names = {"py.typed"} | {path.name for path in (ROOT / "src" / "memzoo").glob("*.py")}
    for folder in CODE_FOLDERS:
        paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        names |= {path.as_posix() for path in paths if path.suffix == ".py"}
        names |= {path.as_posix() for path in paths if folder == "configs" and path.suffix == ".yaml"}
        names |= {path.as_posix() for path in paths if path.parent == TEXTS and path.suffix in {".xz", ".md"}}
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive, and the wheel from it,, from a copy of the tree (a build leaves files)."""
    tree, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("dist")
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # Folders that must stay out of the wheel are there to be left out; so is a stray module at the root.
    (tree / "stray.py").write_text("")
    for name in (*CODE_FOLDERS, "src", "tests", "tools"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "golden")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 28) == 0o12]
        package = {name.removeprefix("memzoo/") for name in names if name.startswith("memzoo/")}
        assert package == package_files()
        assert {name.split("/")[0] for name in names} == {"memzoo", next(iter(_metadata_folder(names)))}
        assert links == []
        # A link that was packed as a file would hold its target's path.
        assert archive.read("memzoo/layers/__init__.py") == (ROOT / "layers" / "__init__.py").read_bytes()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "memzoo = memzoo.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_source_archive_holds_real_files(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert {f"src/memzoo/{name}" for name in package_files()} <= names
    assert not any(name.startswith(("tests/", "tools/", "stray")) for name in names)


def _metadata_folder(names: set[str]) -> set[str]:
    return {name.split("/")[0] for name in names if ".dist-info/" in name}
