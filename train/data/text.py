"""Text as contiguous windows of tokens, with the borders of the documents kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .batches import BatchSource, ResumableLoader, TokenBatch, check_loader_settings
from .mqar import IGNORE_INDEX
from .texts import load_text
from .tokenizers import BYTES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenStream:
    """Documents one after another.

    Attributes:
        tokens: (L,) int64.
        starts: (N,) int64, ascending positions at which a document begins; the first is 0.
    """

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def join(cls, documents: Sequence[np.ndarray]) -> TokenStream:
        """Put tokenised documents one after another; empty ones are left out."""
        documents = [document for document in documents if len(document)]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int64)
        return cls(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.cumsum(lengths) - lengths))

    def cut(self, position: int) -> tuple[TokenStream, TokenStream]:
        """Two streams, before and from ``position``; a document across it is continued as one of its own."""
        before = self.starts[self.starts < position]
        after = self.starts[self.starts > position] - position
        return (
            TokenStream(self.tokens[:position], before),
            TokenStream(self.tokens[position:], torch.cat([torch.zeros(1, dtype=torch.int64), after])),
        )


class TextDataModule(LightningDataModule):
    """Language-model batches from texts on this machine.

    Every training window holds ``seq_len`` tokens in their original order, and every token is predicted once
    per epoch. With ``reset_at_documents`` a batch that holds a document border is packed (``cu_seqlens``), so
    no memory crosses it and no loss is taken for the first token of a text.

    Args:
        texts: names of bundled texts (``memzoo list`` shows them), or one name.
        files: further ``.txt`` files (one document each) or ``.jsonl`` files (one document per line), or the
            name of one.
        text_field: field of a ``.jsonl`` line that holds the text.
        val_texts: names of bundled texts for validation.
        val_files: files for validation, as in ``files``.
        val_fraction: share of the tokens, from the end, that is held out when there is neither of those;
            whole documents where there is more than one.
        tokenizer: ``"bytes"``, a folder with a tokenizer, or a ``.gguf`` file.
        seq_len: tokens per window.
        batch_size: windows per batch.
        max_val_windows: windows read by a validation, from the start of the held-out part; None reads all.
        reset_at_documents: whether documents are separate sequences inside a window.
        append_eos: end every document with the tokenizer's end-of-text token.
        shuffle: read the windows of an epoch in a random order, drawn from ``seed`` and the epoch.
        seed: seed of the order.
        num_workers: worker processes; 0 reads in the main process.

    Raises:
        ValueError: unknown text, missing file, or too little text for one window.
    """

    def __init__(
        self,
        texts: Sequence[str] | str = (),
        files: Sequence[str] | str = (),
        text_field: str = "text",
        val_texts: Sequence[str] | str = (),
        val_files: Sequence[str] | str = (),
        val_fraction: float = 0.05,
        tokenizer: str = BYTES,
        seq_len: int = 512,
        batch_size: int = 8,
        max_val_windows: int | None = 64,
        reset_at_documents: bool = True,
        append_eos: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers)
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
        if not texts and not files:
            raise ValueError("no text to train on. Name a bundled text in texts, or give files.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        self.texts, self.files, self.text_field = _names(texts), _names(files), text_field
        self.val_texts, self.val_files, self.val_fraction = _names(val_texts), _names(val_files), val_fraction
        for file in (*self.files, *self.val_files):
            check_text_file(file)
        self.tokenizer_source = tokenizer
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(tokenizer)
        self.seq_len, self.batch_size, self.max_val_windows = seq_len, batch_size, max_val_windows
        self.reset_at_documents, self.append_eos = reset_at_documents, append_eos
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self._train: TokenStream | None = None
        self._val: TokenStream | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        train = self._stream(self.texts, self.files)
        if self.val_texts or self.val_files:
            val = self._stream(self.val_texts, self.val_files)
        else:
            train, val = train.cut(held_out_start(train, self.val_fraction))
        for name, stream in (("training", train), ("validation", val)):
            if len(stream) <= self.seq_len:
                raise ValueError(
                    f"the {name} text has {len(stream)} tokens, a window needs {self.seq_len + 1}. "
                    "Give more text, a smaller seq_len, or another val_fraction."
                )
        self._train, self._val = train, val

    def train_dataloader(self) -> ResumableLoader:
        assert self._train is not None, "setup() has not run"
        trainer = self.trainer
        return ResumableLoader(
            self._windows(self._train, shuffle=self.shuffle),
            num_workers=self.num_workers,
            num_processes=trainer.world_size if trainer is not None else 1,
            process_index=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> ResumableLoader:
        assert self._val is not None, "setup() has not run"
        windows = self._windows(self._val, shuffle=False, max_windows=self.max_val_windows)
        return ResumableLoader(windows, num_workers=self.num_workers)

    def test_dataloader(self) -> ResumableLoader:
        assert self._val is not None, "setup() has not run"
        return ResumableLoader(self._windows(self._val, shuffle=False), num_workers=self.num_workers)

    def _stream(self, texts: Sequence[str], files: Sequence[str]) -> TokenStream:
        documents = [document.text for name in texts for document in load_text(name)]
        documents += [document for file in files for document in read_documents(file, self.text_field)]
        return TokenStream.join(
            encode_documents(
                self.tokenizer, documents, append_eos=self.append_eos, as_bytes=self.tokenizer_source == BYTES
            )
        )

    def _windows(
        self, stream: TokenStream, *, shuffle: bool, max_windows: int | None = None
    ) -> WindowBatches:
        return WindowBatches(
            stream,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            reset_at_documents=self.reset_at_documents,
            shuffle=shuffle,
            seed=self.seed,
            max_windows=max_windows,
        )


class WindowBatches(BatchSource):
    """Batches of windows of a token stream.

    Window number i reads the tokens ``i seq_len .. (i + 1) seq_len - 1`` and predicts each one's successor.
    The rest that fills no window is not read; the last batch of an epoch may be smaller.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_size: int,
        reset_at_documents: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        max_windows: int | None = None,
    ) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.reset_at_documents = reset_at_documents
        self.shuffle = shuffle
        self.seed = seed
        self.num_windows = max(len(stream) - 1, 0) // seq_len
        if max_windows is not None:
            self.num_windows = min(self.num_windows, max_windows)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def num_batches(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        numbers = self._epoch_order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        starts = torch.from_numpy(numbers) * self.seq_len  # (B,)
        positions = starts[:, None] + torch.arange(self.seq_len + 1)  # (B, T + 1)
        tokens = self.stream.tokens[positions]
        input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
        if not self.reset_at_documents:
            return TokenBatch(input_ids, labels)
        is_start = torch.isin(positions, self.stream.starts)  # (B, T + 1)
        labels[is_start[:, 1:]] = IGNORE_INDEX
        inside = is_start[:, :-1].clone()
        inside[:, 0] = False
        if not inside.any():
            return TokenBatch(input_ids, labels)
        inside[:, 0] = True
        borders = inside.flatten().nonzero().squeeze(1)
        cu_seqlens = torch.cat([borders, torch.tensor([inside.numel()])])
        return TokenBatch(input_ids.reshape(1, -1), labels.reshape(1, -1), cu_seqlens)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_windows)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
            self._order = (epoch, order)
        return self._order[1]


def held_out_start(stream: TokenStream, fraction: float) -> int:
    """Position from which a stream is held out: a document start that leaves ``fraction`` behind it.

    With a single document, or when whole documents would take more than half of the text, the cut falls
    inside a document.
    """
    position = len(stream) - max(int(len(stream) * fraction), 1)
    earlier = stream.starts[stream.starts <= position]
    document = int(earlier[-1]) if len(earlier) else 0
    return document if document > len(stream) // 2 else position


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)


def check_text_file(file: str) -> None:
    """Refuse a path that is no readable kind of text.

    Raises:
        ValueError: the file is missing or neither ``.txt`` nor ``.jsonl``.
    """
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{file!r} is neither a .txt nor a .jsonl file. Convert it to one of these.")
    if not path.is_file():
        raise ValueError(f"there is no file {file!r} (looked in {Path.cwd()}). Check the path.")


def read_documents(file: str, text_field: str = "text") -> list[str]:
    """Documents of a local file: the whole of a ``.txt``, every line of a ``.jsonl``.

    Raises:
        ValueError: not UTF-8, not JSON, or a line without the field; the message names the line.
    """
    check_text_file(file)
    try:
        content = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file!r} is not UTF-8 text (byte {error.start}). Convert its encoding first."
        ) from None
    if Path(file).suffix == ".txt":
        return [content]
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file!r} line {number} is not JSON: {error.msg}.") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            fields = ", ".join(sorted(record)) if isinstance(record, dict) else "no fields"
            raise ValueError(
                f"{file!r} line {number} has no text in the field {text_field!r} (it has: {fields})."
            )
        documents.append(record[text_field])
    return documents


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
