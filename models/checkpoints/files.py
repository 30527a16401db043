"""Atomic files, and folders whose content is sealed by a manifest.

A file appears under its own name only when it is whole: it is written under a temporary name in the same
folder, synced, then renamed.

A folder of several files is replaced in three steps, and a kill at any moment leaves either the old or the
new content readable:

1. every new file is *staged* beside the old one, under a name that carries its SHA-256;
2. `memzoo_manifest.json`, which lists the SHA-256 and size of every file, is renamed into place: this is the
   commit;
3. the staged files are renamed over the old ones.

A reader first calls `verify_folder`, which completes step 3 if it was cut short, and refuses content that
differs from the manifest.
"""

import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "memzoo_manifest.json"
MANIFEST_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
TRAINING_KIND = "training_checkpoint"  # `kind` in the manifest of what `memzoo train` resumes from

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _apply_default_mode(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: StrPath, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, keys in the given order, two blanks of indentation."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: StrPath) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is absent, larger than 64 MiB, not UTF-8, not JSON, or not an object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; a JSON file here has at most {MAX_JSON_BYTES}."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). The file is damaged; fetch or save it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def sha256_of(path: StrPath) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_folder(
    folder: StrPath,
    writers: Mapping[str, Callable[[Path], None]],
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder of files and its manifest; a kill on the way leaves the old or the new content.

    Args:
        folder: created if absent.
        writers: file name -> function that writes that file at the path it is given. Called in order.
        extra: further entries of the manifest (what the folder is), beside `format_version` and `files`.

    Raises:
        CheckpointError: `folder` is an existing file, or a file name contains a path separator.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected the name of a folder to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _finish_commit(folder)
        old_names = set(_listed_files(folder)) if (folder / MANIFEST_NAME).exists() else set()
    except CheckpointError as error:
        logger.warning("%s Saving over it.", error)
        old_names = set()

    listed: dict[str, dict[str, Any]] = {}
    try:
        for name, write in writers.items():
            _check_plain_name(name, folder)
            handle, temporary_name = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
            os.close(handle)
            temporary = Path(temporary_name)
            try:
                write(temporary)
                _apply_default_mode(temporary)
                _sync(temporary)
                digest = sha256_of(temporary)
                listed[name] = {"sha256": digest, "num_bytes": temporary.stat().st_size}
                os.replace(temporary, _staged_path(folder, name, digest))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync(folder)
        write_json(
            folder / MANIFEST_NAME, {"format_version": MANIFEST_VERSION, **(extra or {}), "files": listed}
        )
    except BaseException:
        _drop_staged(folder, listed)
        raise
    _finish_commit(folder)
    for name in old_names - set(listed):
        (folder / name).unlink(missing_ok=True)
    for pattern in (".*.staged", *(f".{glob.escape(name)}.*.tmp" for name in (*listed, MANIFEST_NAME))):
        for leftover in folder.glob(pattern):  # of saves that were killed
            leftover.unlink(missing_ok=True)
    _sync(folder)


def seal_folder(folder: StrPath, names: list[str], *, extra: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of a folder whose files stand there already."""
    folder = Path(folder)
    listed = {}
    for name in names:
        _check_plain_name(name, folder)
        listed[name] = {"sha256": sha256_of(folder / name), "num_bytes": (folder / name).stat().st_size}
    write_json(folder / MANIFEST_NAME, {"format_version": MANIFEST_VERSION, **(extra or {}), "files": listed})


def verify_folder(
    folder: StrPath, *, required: bool = False, only: Collection[str] | None = None
) -> dict[str, Any] | None:
    """Checks a folder against its manifest, and completes a save that was cut short after its commit.

    Args:
        folder: a checkpoint folder.
        required: whether a folder without a manifest is an error (our own folders) or fine (foreign ones).
        only: check just these of the listed files; default all.

    Returns:
        The manifest, or None where there is none.

    Raises:
        CheckpointError: a listed file is absent or its size or SHA-256 differ; or there is no manifest and
            one is required.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).exists():
        if required:
            raise CheckpointError(
                f"{folder} has no {MANIFEST_NAME}, which every folder saved by memzoo has. "
                "Copy the whole folder again, or save the model again."
            )
        return None
    _finish_commit(folder)
    for name, entry in _listed_files(folder).items():
        if only is not None and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, but {MANIFEST_NAME} lists it. Copy the whole folder again."
            )
        if path.stat().st_size != entry["num_bytes"] or sha256_of(path) != entry["sha256"]:
            remedy = (
                "Copy the whole folder again, or save the model again."
                if required
                else f"Restore it, or, in a folder not saved by memzoo, delete {MANIFEST_NAME} to vouch for "
                "the content yourself."
            )
            raise CheckpointError(
                f"{path} differs from the SHA-256 in {MANIFEST_NAME}: "
                f"the file was damaged or changed after saving. {remedy}"
            )
    return read_json(folder / MANIFEST_NAME)


def peek_folder(folder: StrPath) -> dict[str, Any] | None:
    """The manifest of a folder whose files are all there in their sizes, or None; contents are not read."""
    folder = Path(folder)
    try:
        for name, entry in _listed_files(folder).items():
            staged = _staged_path(folder, name, entry["sha256"])
            path = staged if staged.exists() else folder / name
            if not path.is_file() or path.stat().st_size != entry["num_bytes"]:
                return None
        return read_json(folder / MANIFEST_NAME)
    except (CheckpointError, OSError):
        return None


def _drop_staged(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes the staged files of a save that failed, unless its manifest was written after all."""
    with suppress(CheckpointError, OSError):
        if (folder / MANIFEST_NAME).exists() and _listed_files(folder) == listed:
            return
        for name, entry in listed.items():
            _staged_path(folder, name, entry["sha256"]).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _finish_commit(folder: Path) -> None:
    """Renames the staged files that the manifest names over their final names."""
    if not (folder / MANIFEST_NAME).exists():
        return
    for name, entry in _listed_files(folder).items():
        staged = _staged_path(folder, name, entry["sha256"])
        if staged.exists():
            os.replace(staged, folder / name)


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST_NAME
    manifest = read_json(path)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has format_version {manifest.get('format_version')!r}, this version of memzoo reads "
            f"{MANIFEST_VERSION}."
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} lists no files. The manifest is damaged; copy the folder again.")
    for name, entry in files.items():
        _check_plain_name(name, folder)
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or len(entry["sha256"]) != 64
            or not all(letter in "0123456789abcdef" for letter in entry["sha256"])
            or not isinstance(entry.get("num_bytes"), int)
        ):
            raise CheckpointError(f"{path}: the entry of {name!r} is damaged; copy the folder again.")
    return files


def _check_plain_name(name: str, folder: Path) -> None:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > 180:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name.")


def _staged_path(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest[:32]}.staged"


def _apply_default_mode(path: Path) -> None:
    # mkstemp makes files private; a checkpoint gets the mode that an ordinary open() would have given it
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
