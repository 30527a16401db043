"""YAML configurations shipped with the package, found by names such as `train/mqar_based`."""

import difflib
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


def summary(name: str) -> str:
    """The first comment line of a shipped configuration."""
    first = find(name).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
