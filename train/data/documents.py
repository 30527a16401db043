"""Documents of local files, and their token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def check_text_file(file: str, suffixes: Sequence[str] = (".txt", ".jsonl")) -> None:
    """Refuse a path that is no readable kind of text.

    Args:
        suffixes: how the name may end.

    Raises:
        ValueError: the file is missing or of another kind.
    """
    path = Path(file)
    if path.suffix not in suffixes:
        kinds = f"neither a {' nor a '.join(suffixes)}" if len(suffixes) > 1 else f"not a {suffixes[0]}"
        raise ValueError(f"{file!r} is {kinds} file. Convert it, or read it with `dataset`.")
    if not path.is_file():
        raise ValueError(f"there is no file {file!r} (looked in {Path.cwd()}). Check the path.")


def read_documents(file: str, text_field: str = "text") -> list[str]:
    """Documents of a local file: the whole of a ``.txt``, every line of a ``.jsonl``.

    Raises:
        ValueError: not UTF-8, not JSON, or a line without the field; the message names the line.
    """
    check_text_file(file)
    if Path(file).suffix == ".txt":
        return [_read(file)]
    return [text_of(record, text_field, place) for place, record in read_records(file)]


def read_records(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (``'name' line number``) and content of every line of a ``.jsonl`` file.

    Raises:
        ValueError: not UTF-8, or a line that is no JSON object; the message names the line.
    """
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file!r} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error.msg}.") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place} is no JSON object with fields, got {type(record).__name__}.")
        yield place, record


def text_of(record: Mapping[str, Any], text_field: str, place: str) -> str:
    """The text in a field of a record.

    Args:
        place: where the record stands, for the message.

    Raises:
        ValueError: no text there; the message names the fields there are.
    """
    text = record.get(text_field)
    if not isinstance(text, str):
        raise ValueError(
            f"{place} has no text in the field {text_field!r} (it has: {', '.join(sorted(record))}). "
            "Name the field that holds it in text_field."
        )
    return text


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file!r} is not UTF-8 text (byte {error.start}). Convert its encoding first."
        ) from None


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    *,
    append_eos: bool = False,
    as_bytes: bool = False,
) -> list[np.ndarray]:
    """Token ids of each document, (L,) int64.

    Args:
        append_eos: end every document with the tokenizer's end-of-text token.
        as_bytes: the tokenizer is the built-in byte vocabulary, so that the bytes themselves are the ids.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "append_eos needs a tokenizer with an end-of-text token; this one has none. Set append_eos=False."
        )
    end = [tokenizer.eos_token_id] if append_eos else []
    if as_bytes:
        encoded = [
            np.frombuffer(document.encode("utf-8"), dtype=np.uint8).astype(np.int64) for document in documents
        ]
    else:
        batch = tokenizer.backend_tokenizer.encode_batch(list(documents), add_special_tokens=False)
        encoded = [np.asarray(encoding.ids, dtype=np.int64) for encoding in batch]
    return [np.concatenate([ids, np.asarray(end, dtype=np.int64)]) for ids in encoded]
