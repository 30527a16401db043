"""YAML configurations shipped with the package, found by names such as `train/mqar_based`."""

import difflib
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of all shipped configurations, sorted."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.glob("*/*.yaml"))


def find(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        ValueError: there is no such name; the message names the nearest.
    """
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(
            f"{name!r} is neither a file nor a shipped configuration. Did you mean {nearest[0]!r}? "
            "`memzoo list --what configs` shows them all."
        )
    return _FOLDER / f"{name}.yaml"


def with_files(arguments: Sequence[str]) -> list[str]:
    """A command line in which the names after `--config` are replaced by the files of shipped configurations.

    Raises:
        ValueError: a name that is neither a file nor shipped.
    """
    resolved = list(arguments)
    for position, token in enumerate(resolved):
        if token.startswith("--config="):
            resolved[position] = f"--config={_file(token.removeprefix('--config='))}"
        elif position and resolved[position - 1] in ("--config", "-c"):
            resolved[position] = _file(token)
    return resolved


def _file(name: str) -> str:
    return name if Path(name).is_file() or Path(name).suffix else str(find(name))


def summary(name: str) -> str:
    """The first comment line of a shipped configuration."""
    first = find(name).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
