"""YAML configurations shipped with the package, found by names such as `train/mqar_based`."""

import difflib
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of all shipped configurations, sorted."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.glob("*/*.yaml"))


def find(name: str, kind: str | None = None) -> Path:
    """The file of a shipped configuration.

    Args:
        name: one of `names()`.
        kind: the folder it is expected in, for the suggestion.

    Raises:
        ValueError: there is no such name; the message names the nearest.
    """
    if name not in names():
        raise ValueError(f"{name!r} is neither a file nor a shipped configuration. {suggestion(name, kind)}")
    return _FOLDER / f"{name}.yaml"


def suggestion(name: str, kind: str | None = None) -> str:
    """A sentence that names the shipped configuration nearest to `name`, or all of the kind.

    Args:
        name: what was given: a name, with or without its folder, or a file.
        kind: look only in this folder, if it is one.
    """
    known = [item for item in names() if item.startswith(f"{kind}/")] or names()
    plain = {item.rpartition("/")[2]: item for item in known}
    nearest = difflib.get_close_matches(Path(name).stem, plain, n=1, cutoff=0.5)
    if nearest:
        return f"Did you mean {plain[nearest[0]]!r}? `memzoo list --what configs` shows them all."
    return f"Shipped ones are {', '.join(known)}."


def with_files(arguments: Sequence[str], kind: str | None = None) -> list[str]:
    """A command line in which the names after `--config` are replaced by the files of shipped configurations.

    Args:
        arguments: the command line.
        kind: the folder that names are expected in, for suggestions.

    Raises:
        ValueError: a name that is neither a file nor shipped.
    """
    resolved = list(arguments)
    for position, token in enumerate(resolved):
        if token.startswith("--config="):
            resolved[position] = f"--config={_file(token.removeprefix('--config='), kind)}"
        elif position and resolved[position - 1] in ("--config", "-c"):
            resolved[position] = _file(token, kind)
    return resolved


def _file(name: str, kind: str | None) -> str:
    return name if Path(name).is_file() or Path(name).suffix else str(find(name, kind))


def summary(name: str) -> str:
    """The first sentence of the comment at the top of a shipped configuration."""
    lines = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("#").strip())
        if lines[-1].endswith("."):
            break
    return " ".join(lines)
