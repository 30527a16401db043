"""Text for Lightning: documents of files, bundled texts and data sets, read as windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule

from .batches import ResumableLoader, check_loader_settings
from .documents import check_text_file, encode_documents, read_documents
from .texts import load_text
from .tokenizers import BYTES, load_tokenizer
from .windows import TokenStream, WindowBatches, held_out_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)
