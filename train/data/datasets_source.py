"""Rows of anything that the library `datasets` reads: local files, saved folders, the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A data set that the library `datasets` reads.

    Code that comes with a data set is never run.

    Args:
        path: ``json``, ``parquet``, ``arrow``, ``csv`` or ``text`` (every line a row) for the files in
            ``data_files``; or a folder with such files, or one that ``save_to_disk`` wrote; or a name on the
            Hugging Face hub.
        name: which configuration of a data set on the hub.
        split: which part of it.
        data_files: files or patterns such as ``data/*.parquet``, or one of them.
        data_dir: folder that holds the files.
        revision: version of a data set on the hub: a branch, a tag or a commit.
        skip_rows: rows left out at the beginning.
        max_rows: rows read behind those; None reads all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | Sequence[str] | None = None
    data_dir: str | None = None
    revision: str | None = None
    skip_rows: int = 0
    max_rows: int | None = None

    def check(self) -> None:
        """Refuse settings that do not fit one another; `open_dataset` and `stream_dataset` ask for it.

        Raises:
            ValueError: the message names them.
        """
        # not when it is made: a parser of configurations would bury the message in one of its own
        if not self.path or not self.split:
            raise ValueError(f"dataset needs a path and a split, got {self.path!r} and {self.split!r}.")
        if self.skip_rows < 0 or (self.max_rows is not None and self.max_rows < 1):
            raise ValueError(
                f"skip_rows must be at least 0 and max_rows at least 1 (or null for all), got "
                f"{self.skip_rows} and {self.max_rows}."
            )
        if self.path in FILE_KINDS and not self.data_files and not self.data_dir:
            raise ValueError(f"dataset path {self.path!r} needs files. Name them in data_files or data_dir.")
        remote = {"name": self.name, "revision": self.revision}
        local = remote | {"data_files": self.data_files, "data_dir": self.data_dir}
        unused = remote if self.path in FILE_KINDS else local if self._is_saved_folder else {}
        given = [key for key, value in unused.items() if value is not None]
        if given:
            raise ValueError(
                f"dataset: {' and '.join(given)} has no effect for the path {self.path!r}. Leave it out."
            )

    def __str__(self) -> str:
        files = _listed(self.data_files or str(self.data_dir))
        where = ", ".join(files) if self.path in FILE_KINDS else self.path
        return f"the split {self.split!r} of the data set {where!r}"

    @property
    def _is_saved_folder(self) -> bool:
        return any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_dataset(source: DatasetSource, field: str) -> Dataset:
    """The rows with one field, on disk and read as they are asked for.

    Raises:
        ValueError: not there, not reachable, access not granted, no rows, or no such field.
    """
    rows = _loaded(source, streaming=False)
    if field in (rows.column_names or []):
        rows = rows.select_columns([field])
    stop = len(rows) if source.max_rows is None else min(len(rows), source.skip_rows + source.max_rows)
    if source.skip_rows >= stop:
        raise _empty(source)
    if source.skip_rows or stop < len(rows):
        rows = rows.select(range(source.skip_rows, stop))
    _check_first(rows, source, field)
    return rows


def stream_dataset(source: DatasetSource, field: str) -> IterableDataset:
    """The rows with one field, as they come from the files or over the network; nothing is stored.

    Raises:
        ValueError: as `open_dataset`.
    """
    rows = _loaded(source, streaming=True)
    if field in (rows.column_names or []):
        rows = rows.select_columns([field])
    if source.skip_rows:
        rows = rows.skip(source.skip_rows)
    if source.max_rows is not None:
        rows = rows.take(source.max_rows)
    _check_first(rows, source, field)
    return rows


def numbered(
    rows: Dataset | IterableDataset, source: DatasetSource
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place (for messages) and content of every row."""
    for number, row in enumerate(rows, start=source.skip_rows + 1):
        yield f"row {number} of {source}", row


def _loaded(source: DatasetSource, *, streaming: bool) -> Any:
    """What `datasets` makes of a source, its errors as ours."""
    import datasets

    source.check()
    try:
        if source._is_saved_folder:
            return _saved_folder(source, streaming=streaming)
        return datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            data_files=None if source.data_files is None else _listed(source.data_files),
            data_dir=source.data_dir,
            revision=source.revision,
            streaming=streaming,
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise ValueError(
                f"access to the data set {source.path!r} has to be granted first. Accept its terms on the "
                "page of the data set, then log in with `hf auth login`."
            ) from error
        raise ValueError(
            f"there is no data set {source.path!r} here or on the hub ({_line(error)}). Give a name on the "
            f"hub, a folder, or one of {', '.join(FILE_KINDS)} with data_files."
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"the data set {source.path!r} is not on this machine and the hub cannot be reached "
            f"({_line(error)}). Go online, or bring it here with save_to_disk and give that folder."
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        cause = f": {_line(error.__cause__)}" if error.__cause__ is not None else ""
        raise ValueError(f"cannot read {source}: {_line(error)}{cause}") from error
    except StopIteration as error:
        raise _empty(source) from error


def _saved_folder(source: DatasetSource, *, streaming: bool) -> Any:
    """A folder that `save_to_disk` wrote, which holds one split or several."""
    import datasets

    rows = datasets.load_from_disk(source.path)
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise ValueError(f"it has no split {source.split!r}, only {', '.join(rows)}.")
        rows = rows[source.split]
    elif source.split not in ("train", str(rows.split)):
        raise ValueError("the folder holds a single split. Leave split out.")
    return rows.to_iterable_dataset() if streaming else rows


def _check_first(rows: Dataset | IterableDataset, source: DatasetSource, field: str) -> None:
    """Refuse rows that are not there or lack the field, before anything is built on them."""
    import datasets

    try:
        first = next(iter(rows), None)
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read {source}: {_line(error)}") from error
    if first is None:
        raise _empty(source)
    if field not in first:
        raise ValueError(
            f"{source} has no field {field!r} (it has: {', '.join(map(str, first))}). Name the one to read."
        )


def _empty(source: DatasetSource) -> ValueError:
    return ValueError(f"{source} holds no row. Check split, data_files, skip_rows and max_rows.")


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
