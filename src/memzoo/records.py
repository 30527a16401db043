"""Measured results as JSON files that say how to repeat them.

Every evaluation and every benchmark writes through `write_record`: the results together with the command, the
configuration, the commit, the versions of the libraries and the hardware. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

FORMAT_VERSION = 1
_NO_RECORDS = ":(top,exclude)benchmarks/records"
_LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "causal-conv1d",
    "flash-attn",
    "flash-linear-attention",
    "mamba-ssm",
)


def write_record(
    path: str | os.PathLike[str],
    *,
    name: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    command: str | None = None,
    commit: str | None = None,
) -> Path:
    """Write one result with everything needed to repeat it; the file appears whole or not at all.

    Args:
        path: file to write, ending in ``.json``; missing folders are made.
        name: what was measured, for example ``"evaluate/perplexity"``.
        config: the settings of the measurement.
        results: the figures. Numbers that are not finite are written as null.
        command: the command line; None takes the one this process was started with.
        commit: the commit measured; None asks git, which needs the folder ``.git`` beside the sources.

    Returns:
        the path written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"a record is a .json file, got {str(path)!r}. Choose a name that ends in .json.")
    record = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "command": current_command() if command is None else command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit() if commit is None else commit,
        "versions": library_versions(),
        "hardware": hardware(),
        "config": _plain(config),
        "results": _plain(results),
    }
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")
    return path


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a record back.

    Raises:
        ValueError: there is no such file, it is not a record, or of a newer format.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no record {str(path)!r} (looked in {Path.cwd()}). Check the path.")
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON record ({error}). Write records with write_record.") from None
    kinds = {"format_version": int, "name": str, "config": dict, "results": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kinds[key]) for key in kinds):
        raise ValueError(
            f"{path} is JSON but not a record: it lacks {', '.join(kinds)}, or has them of another kind. "
            "Give a file that `memzoo evaluate`, `bench` or `convert` wrote."
        )
    if record["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has record format {record['format_version']}, but this version reads up to "
            f"{FORMAT_VERSION}. Update memzoo."
        )
    return record


def results_folder(path: str | os.PathLike[str]) -> Path:
    """Makes the folder for results before any work is done.

    Raises:
        ValueError: there is a file of that name, or the folder cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"results cannot be written to {str(path)!r} ({error.strerror}). Name another folder."
        ) from error
    return folder


def refuse_content(folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
    """Refuses to write where something lies already.

    Args:
        folder: where to write.
        names: what in the folder would be replaced; None is everything.

    Raises:
        ValueError: the message names what is there.
    """
    folder = Path(folder)
    candidates = [folder / name for name in names] if names is not None else [folder]
    taken = [
        path
        for path in candidates
        if (path.is_file() and path != folder) or (path.is_dir() and any(path.iterdir()))
    ]
    if taken:
        raise ValueError(
            f"there is something in {', '.join(repr(str(path)) for path in taken)} already. "
            "Name another folder, or add --overwrite (in Python overwrite=True) to replace it."
        )


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through a temporary name beside it, so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def current_command() -> str:
    """The command line of this process, with the program's bare name (no machine paths)."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # started with python -m
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])


def without_places(command: str) -> str:
    """A command line in which of absolute paths only the last part is said."""
    shown = []
    for word in shlex.split(command):
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else word)
    return shlex.join(shown)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that can change a number."""
    versions = {"python": platform.python_version(), "memzoo": __version__}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, threads of torch, and the accelerator if there is one."""
    import torch

    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["accelerator"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def git_commit() -> str | None:
    """Commit of the source tree in use, with ``-dirty`` when it has changes; None for an installed copy.

    Records do not count: a benchmark that writes its record after every part would call itself changed.
    """
    file = Path(__file__).resolve()
    folder = file.parent
    try:
        _git(
            folder, "ls-files", "--error-unmatch", file.name
        )  # an installed copy may lie inside another repository
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", _NO_RECORDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """Plain JSON data; numbers that are not finite become null, tensors and arrays become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
