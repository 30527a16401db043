"""The folder of a conversion: one conversion at a time, and on goes only what was begun there.

FOLDER/conversion.json    what is converted and how; what is done already
FOLDER/work/              what an unfinished conversion goes on from; removed at the end
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ... import __version__
from ...models.checkpoints.errors import CheckpointError
from ...models.checkpoints.files import read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST = "conversion.json"
FORMAT_VERSION = 1
_LOCK = "lock"
_WRITTEN = (MANIFEST, "report.json", "index.html")
# nothing else is ever written into work/, so anything else there is somebody's own
_PARTS = ("rows", "selection.json", "stages", "teacher")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps others from converting into the same folder meanwhile; a kill gives it free.

    Raises:
        ValueError: another conversion is running in it, its `work` holds somebody's own files, or what a
            conversion writes cannot have its name there.
    """
    _parts(folder)
    work = folder / "work"
    for path, is_wrong, kind in (
        (work, work.exists() and not work.is_dir(), "file"),
        *((folder / name, (folder / name).is_dir(), "folder") for name in _WRITTEN),
    ):
        if is_wrong:
            raise ValueError(
                f"{str(path)!r} is a {kind}, which a conversion would have to replace. "
                "Name another output folder."
            )
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle, folder)
        for name in _WRITTEN:
            for leftover in folder.glob(f".{name}.*"):  # of a write that was killed
                leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            if not _parts(folder):
                with suppress(OSError):
                    (work / _LOCK).unlink()
                    work.rmdir()
    finally:
        os.close(handle)


def is_begun(folder: Path) -> bool:
    """Whether an unfinished conversion lies in a folder."""
    if not _parts(folder):
        return False
    return not ((folder / MANIFEST).is_file() and _manifest(folder).get("is_finished"))


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what is going to be done; goes on where the same was begun.

    Args:
        settings: what may not change between the parts of one conversion, as plain data.

    Raises:
        ValueError: the folder holds the beginning of another conversion, or its manifest is damaged.
    """
    plain = as_json(settings)
    if is_begun(folder):
        begun = _manifest(folder).get("settings")
        if begun == plain:
            return
        what = _difference(begun if isinstance(begun, dict) else {}, plain)
        raise ValueError(
            f"{str(folder)!r} holds the beginning of another conversion (other {what}). "
            "Name another folder, or add --overwrite (in Python overwrite=True) to start anew."
        )
    _remove_parts(folder)
    content = {"format_version": FORMAT_VERSION, "version": __version__, "settings": plain, "runs": {}}
    write_json(folder / MANIFEST, content)


def note_run(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Adds a finished run to the manifest."""
    content = _manifest(folder)
    content["runs"] = {**content.get("runs", {}), name: as_json(facts)}
    write_json(folder / MANIFEST, content)


def finish(folder: Path) -> None:
    """Notes that all is done, and removes what only an unfinished conversion needs."""
    write_json(folder / MANIFEST, {**_manifest(folder), "is_finished": True})
    _remove_parts(folder)


def start_anew(folder: Path) -> None:
    """Removes the beginning of a conversion; results stay until there are new ones.

    Raises:
        ValueError: `work` holds somebody's own files.
    """
    _remove_parts(folder)
    (folder / MANIFEST).unlink(missing_ok=True)


def as_json(value: Any) -> Any:
    """Plain data as JSON gives it back: text keys, lists."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / MANIFEST)
    except CheckpointError as error:
        raise ValueError(
            f"{error} It says which conversion {str(folder / 'work')!r} is of. Add --overwrite to start anew."
        ) from None
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(folder / MANIFEST)!r} has format_version {content.get('format_version')!r}, this version "
            f"goes on with {FORMAT_VERSION}. Add --overwrite to start anew."
        )
    return content


def _parts(folder: Path) -> list[str]:
    """What lies in `work`, the lock left out."""
    work = folder / "work"
    found = sorted(path.name for path in work.iterdir()) if work.is_dir() else []
    for name in found:
        if name not in (*_PARTS, _LOCK) and not name.startswith(f".{_PARTS[1]}."):
            raise ValueError(
                f"{str(work)!r} is not of a conversion: it holds {name!r}. Name another output folder."
            )
    return [name for name in found if name != _LOCK]


def _remove_parts(folder: Path) -> None:
    for name in _parts(folder):
        path = folder / "work" / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not while it holds a lock
        (folder / "work").rmdir()


def _difference(begun: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What differs, to be read behind the word "other"."""
    key = next((key for key in given if begun.get(key) != given[key]), "settings")
    there, here = begun.get(key), given.get(key)
    if key == "threads":
        return f"threads: {there} there, {here} here. OMP_NUM_THREADS={there} goes on with it"
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        inner = next((name for name in here if there.get(name) != here[name]), "")
        return f"{key}: {inner}"
    return key


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is converting into {str(folder)!r}. Wait for its end, or name another folder."
        ) from None
    except OSError as error:  # storage that cannot lock is no reason not to convert
        logger.info("%s cannot be locked (%s)", folder, error.strerror)
