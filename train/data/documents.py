"""Documents of bundled texts, files and data sets, and their token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .datasets_source import DatasetSource, numbered, open_dataset, stream_dataset
from .texts import load_text
from .tokenizers import BYTES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# documents encoded at once
_ENCODED_TOGETHER = 1000


class TextEncoder:
    """Documents as token ids.

    Args:
        tokenizer: ``"bytes"``, a folder with a tokenizer, a ``.gguf`` file, or ``"smollm2-135m"``.
        append_eos: end every document with the tokenizer's end-of-text token.
        text_field: field of a record that holds the text.

    Raises:
        ValueError: no tokenizer there, or one without an end-of-text token where one is wanted.
    """

    def __init__(self, tokenizer: str, *, append_eos: bool, text_field: str) -> None:
        self.as_bytes = tokenizer == BYTES
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(tokenizer)
        self.append_eos, self.text_field = append_eos, text_field
        self.encode([])

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each document, (L,) int64."""
        return encode_documents(self.tokenizer, documents, append_eos=self.append_eos, as_bytes=self.as_bytes)

    def encode_all(
        self, texts: Sequence[str], files: Sequence[str], dataset: DatasetSource | None
    ) -> list[np.ndarray]:
        """All documents of bundled texts, files and a data set, in this order."""
        documents = [document.text for name in texts for document in load_text(name)]
        documents += [document for file in files for document in read_documents(file, self.text_field)]
        encoded = self.encode(documents)
        if dataset is not None:
            rows = numbered(open_dataset(dataset, self.text_field), dataset)
            while part := [
                text_of(row, self.text_field, place) for place, row in islice(rows, _ENCODED_TOGETHER)
            ]:
                encoded += self.encode(part)
        return encoded

    def encode_first(self, dataset: DatasetSource, num_tokens: int) -> list[np.ndarray]:
        """The first documents of a data set, read as it comes: as many as it takes to ``num_tokens``."""
        encoded, length = [], 0
        for place, row in numbered(stream_dataset(dataset, self.text_field), dataset):
            encoded += self.encode([text_of(row, self.text_field, place)])
            length += len(encoded[-1])
            if length >= num_tokens:
                break
        return encoded


def names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)


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
            raise ValueError(
                f"{place} is not JSON: {error.msg}. Correct the line, or leave it out."
            ) from None
        except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
            raise ValueError(f"{place} cannot be read: {error}. Leave the line out.") from None
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
    check_characters(text, place)
    return text


def check_characters(text: str, place: str) -> None:
    """Refuse half a surrogate pair, which JSON can write and no encoding of text has.

    Args:
        place: where the text stands, for the message.

    Raises:
        ValueError: there is one; the message says which and where.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode("ascii")
        raise ValueError(
            f"{place}: character {error.start} of the text is {half}, half a surrogate pair, which is no "
            "character. Write a \\ufffd in its place, or leave this text out."
        ) from None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
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
