"""Conversations for Lightning: whole ones packed into rows, with a loss on what the assistant says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from .batches import (
    BatchSource,
    EpochOrder,
    ResumableLoader,
    TokenBatch,
    check_ids,
    check_loader_settings,
)
from .conversations import Conversation, ConversationEncoder, messages_of
from .datasets_source import DatasetSource, numbered, open_dataset
from .documents import check_text_file, names, read_records
from .mqar import IGNORE_INDEX

logger = logging.getLogger(__name__)

# conversations encoded at once
_ENCODED_TOGETHER = 1000


class ChatDataModule(LightningDataModule):
    """Conversations as training and validation data.

    The tokenizer's chat template writes each conversation, and only the assistant's tokens are predicted, the
    end of each turn included. Whole conversations are packed into rows of at most ``seq_len`` tokens, without
    padding and as separate sequences (``cu_seqlens``); a longer one is cut. Every conversation is read once
    per epoch.

    Args:
        tokenizer: a folder with a tokenizer, a ``.gguf`` file, ``"smollm2-135m"``, or ``"bytes"``.
        chat_template: a Jinja template, or a ``.jinja`` file, in the place of the tokenizer's own.
        files: ``.jsonl`` files, one conversation per line, or the name of one.
        dataset: a data set that the library `datasets` reads, one conversation per row.
        messages_field: field with the list of messages, each ``{role, content}`` or ``{from, value}``.
        val_files: files for validation, as in ``files``.
        val_dataset: a data set for validation.
        val_fraction: share of the conversations, from the end, that is held out when there is none of those.
        seq_len: largest number of tokens in a row.
        batch_size: rows per batch.
        max_val_rows: rows read by a validation; None reads all.
        shuffle: pack the conversations in a random order, drawn from ``seed``, and read the rows of an epoch
            in one drawn from ``seed`` and the epoch.
        seed: seed of the orders.
        num_workers: worker processes; 0 reads in the main process.

    Raises:
        ValueError: missing file or data set, no chat template, a conversation that is none or that the
            template does not write consistently, or none with a reply.
    """

    def __init__(
        self,
        tokenizer: str,
        chat_template: str | None = None,
        files: Sequence[str] | str = (),
        dataset: DatasetSource | None = None,
        messages_field: str = "messages",
        val_files: Sequence[str] | str = (),
        val_dataset: DatasetSource | None = None,
        val_fraction: float = 0.05,
        seq_len: int = 1024,
        batch_size: int = 8,
        max_val_rows: int | None = 64,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if seq_len < 1 or (max_val_rows is not None and max_val_rows < 1):
            raise ValueError(
                f"seq_len and max_val_rows must be at least 1, got {seq_len} and {max_val_rows}. "
                "max_val_rows may be null for all."
            )
        if not files and dataset is None:
            raise ValueError("no conversations to train on. Give .jsonl files, or a dataset.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        self.files, self.dataset = names(files), dataset
        self.val_files, self.val_dataset, self.val_fraction = names(val_files), val_dataset, val_fraction
        for file in (*self.files, *self.val_files):
            check_text_file(file, (".jsonl",))
        self.encoder = ConversationEncoder(tokenizer, chat_template)
        self.tokenizer = self.encoder.tokenizer
        self.messages_field = messages_field
        self.seq_len, self.batch_size, self.max_val_rows = seq_len, batch_size, max_val_rows
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self._train: ChatBatches | None = None
        self._val: list[Conversation] = []

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        train = self._read(self.files, self.dataset)
        if self.val_files or self.val_dataset is not None:
            val = self._read(self.val_files, self.val_dataset)
        else:
            first = len(train) - max(int(len(train) * self.val_fraction), 1)
            train, val = train[:first], train[first:]
        for name, part in (("training", train), ("validation", val)):
            if not part:
                raise ValueError(
                    f"there is no {name} conversation in which the assistant says something within "
                    f"{self.seq_len} tokens. Give more conversations, or a larger seq_len."
                )
        largest = max(int(conversation.tokens.max()) for conversation in (*train, *val))
        check_ids(self.trainer, largest, self.vocab_size)
        self._train, self._val = self._batches(train, shuffle=self.shuffle), val

    def train_dataloader(self) -> ResumableLoader:
        assert self._train is not None, "setup() has not run"
        trainer = self.trainer
        return ResumableLoader(
            self._train,
            num_workers=self.num_workers,
            num_processes=trainer.world_size if trainer is not None else 1,
            process_index=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> ResumableLoader:
        batches = self._batches(self._val, shuffle=False, max_rows=self.max_val_rows)
        return ResumableLoader(batches, num_workers=self.num_workers)

    def test_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self._batches(self._val, shuffle=False), num_workers=self.num_workers)

    def _batches(
        self, conversations: Sequence[Conversation], *, shuffle: bool, max_rows: int | None = None
    ) -> ChatBatches:
        return ChatBatches(
            conversations,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            max_rows=max_rows,
        )

    def _read(self, files: Sequence[str], dataset: DatasetSource | None) -> list[Conversation]:
        """All conversations of some files and a data set from which something can be learned."""
        records: Iterator[tuple[str, Mapping[str, Any]]] = chain.from_iterable(map(read_records, files))
        if dataset is not None:
            records = chain(records, numbered(open_dataset(dataset, self.messages_field), dataset))
        talks = ((place, messages_of(record, self.messages_field, place)) for place, record in records)
        kept, num_cut, num_silent = [], 0, 0
        while part := list(islice(talks, _ENCODED_TOGETHER)):
            for conversation in self.encoder.encode(part):
                # the first token of a row is read but not predicted, the last one predicted but not read
                if not conversation.is_reply[1 : self.seq_len + 1].any():
                    num_silent += 1
                    continue
                num_cut += len(conversation) > self.seq_len + 1
                kept.append(conversation)
        if num_cut:
            logger.warning("%d of %d conversations are cut to %d tokens", num_cut, len(kept), self.seq_len)
        if num_silent:
            logger.warning(
                "%d conversations are left out: the assistant says nothing within %d tokens",
                num_silent,
                self.seq_len,
            )
        return kept


class ChatBatches(BatchSource):
    """Batches of packed conversations, (1, L) with L at most ``batch_size * seq_len``.

    A row takes one conversation after another until the next one does not fit. The rows are the same in
    every epoch, their order is not.

    Args:
        conversations: each with a token to predict among its first ``seq_len + 1``.
        seq_len: largest number of tokens in a row.
        batch_size: rows per batch; the last batch may be smaller.
        shuffle: fill the rows, and read them, in a random order.
        seed: seed of the orders.
        max_rows: rows that are read; None reads all.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        *,
        seq_len: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        max_rows: int | None = None,
    ) -> None:
        self.conversations = conversations
        self.seq_len, self.batch_size = seq_len, batch_size
        order = np.arange(len(conversations))
        if shuffle:
            order = np.random.default_rng([seed]).permutation(order)
        self.rows = self._packed(order)[:max_rows]
        self._order = EpochOrder(len(self.rows), shuffle=shuffle, seed=seed)

    @property
    def num_batches(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        rows = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        inputs, labels = [], []
        for conversation in (self.conversations[number] for row in rows for number in self.rows[row]):
            tokens = conversation.tokens[: self.seq_len + 1]
            is_reply = conversation.is_reply[: self.seq_len + 1]
            inputs.append(tokens[:-1])
            labels.append(np.where(is_reply, tokens, IGNORE_INDEX)[1:])
        borders = np.cumsum([0, *map(len, inputs)])
        return TokenBatch(
            torch.from_numpy(np.concatenate(inputs))[None],
            torch.from_numpy(np.concatenate(labels))[None],
            torch.from_numpy(borders),
        )

    def _packed(self, order: np.ndarray) -> list[list[int]]:
        """Numbers of the conversations of each row."""
        rows: list[list[int]] = []
        space = 0
        for number in order.tolist():
            length = min(len(self.conversations[number]) - 1, self.seq_len)
            if length > space:
                rows.append([])
                space = self.seq_len
            rows[-1].append(number)
            space -= length
        return rows
