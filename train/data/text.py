"""Text for Lightning: documents of files, bundled texts and data sets, read as windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule

from .batches import BatchSource, ResumableLoader, check_ids, check_loader_settings, refuse_processes
from .contiguous import ContiguousBatches
from .datasets_source import DatasetSource
from .documents import TextEncoder, check_text_file, names
from .tokenizers import BYTES
from .windows import TokenStream, WindowBatches, check_length, check_window_settings, held_out_start


class TextDataModule(LightningDataModule):
    """Language-model batches from texts, files and data sets.

    Every training window holds ``seq_len`` tokens in their original order, and every token is predicted once
    per epoch. With ``reset_at_documents`` a batch that holds a document border is packed (``cu_seqlens``), so
    no memory crosses it and no loss is taken for the first token of a text. With ``contiguous`` each row of a
    batch continues the row of the batch before (`ContiguousBatches`), for training that carries the memory
    on.

    Args:
        texts: names of bundled texts (``memzoo list`` shows them), or one name.
        files: further ``.txt`` files (one document each) or ``.jsonl`` files (one document per line), or the
            name of one.
        dataset: a data set that the library `datasets` reads, one document per row.
        text_field: field of a ``.jsonl`` line or a row that holds the text.
        val_texts: names of bundled texts for validation.
        val_files: files for validation, as in ``files``.
        val_dataset: a data set for validation.
        val_fraction: share of the tokens, from the end, that is held out when there is none of those;
            whole documents where there is more than one.
        tokenizer: ``"bytes"``, a folder with a tokenizer, a ``.gguf`` file, or ``"smollm2-135m"``.
        seq_len: tokens per window.
        batch_size: windows per batch.
        max_val_windows: windows read by a validation, from the start of the held-out part; None reads all.
        contiguous: read long documents through, in successive batches.
        reset_at_documents: whether documents are separate sequences inside a window.
        append_eos: end every document with the tokenizer's end-of-text token.
        shuffle: read the windows of an epoch (documents with ``contiguous``) in a random order, drawn from
            ``seed`` and the epoch.
        seed: seed of the order.
        num_workers: worker processes; 0 reads in the main process.

    Raises:
        ValueError: unknown text, missing file or data set, too little text for one window, too few documents
            for the rows of contiguous batches, or contiguous batches over several processes.
    """

    def __init__(
        self,
        texts: Sequence[str] | str = (),
        files: Sequence[str] | str = (),
        dataset: DatasetSource | None = None,
        text_field: str = "text",
        val_texts: Sequence[str] | str = (),
        val_files: Sequence[str] | str = (),
        val_dataset: DatasetSource | None = None,
        val_fraction: float = 0.05,
        tokenizer: str = BYTES,
        seq_len: int = 512,
        batch_size: int = 8,
        max_val_windows: int | None = 64,
        contiguous: bool = False,
        reset_at_documents: bool = True,
        append_eos: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_window_settings(seq_len=seq_len, max_val_windows=max_val_windows)
        if not texts and not files and dataset is None:
            raise ValueError("no text to train on. Name a bundled text in texts, or give files or a dataset.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        if contiguous and not reset_at_documents:
            raise ValueError("contiguous batches always reset at documents. Leave reset_at_documents out.")
        self.texts, self.files, self.dataset = names(texts), names(files), dataset
        self.val_texts, self.val_files, self.val_dataset = names(val_texts), names(val_files), val_dataset
        self.val_fraction = val_fraction
        for file in (*self.files, *self.val_files):
            check_text_file(file)
        self.encoder = TextEncoder(tokenizer, append_eos=append_eos, text_field=text_field)
        self.tokenizer = self.encoder.tokenizer
        self.seq_len, self.batch_size, self.max_val_windows = seq_len, batch_size, max_val_windows
        self.contiguous, self.reset_at_documents = contiguous, reset_at_documents
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self._train: BatchSource | None = None
        self._val: TokenStream | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        if self.contiguous:
            refuse_processes(self.trainer, "contiguous batches")
        train = TokenStream.join(self.encoder.encode_all(self.texts, self.files, self.dataset))
        if self.val_texts or self.val_files or self.val_dataset is not None:
            val_documents = self.encoder.encode_all(self.val_texts, self.val_files, self.val_dataset)
            val = TokenStream.join(val_documents)
        else:
            train, val = train.cut(held_out_start(train, self.val_fraction))
        check_length(train, "training", self.seq_len)
        check_length(val, "validation", self.seq_len)
        largest = max(int(train.tokens.max()), int(val.tokens.max()))
        check_ids(self.trainer, largest, self.vocab_size)
        self._train, self._val = self._batches(train, self.batch_size, shuffle=self.shuffle), val

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
        return ResumableLoader(self._val_batches(self.max_val_windows), num_workers=self.num_workers)

    def test_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self._val_batches(None), num_workers=self.num_workers)

    def _val_batches(self, max_windows: int | None) -> BatchSource:
        assert self._val is not None, "setup() has not run"
        # Held-out documents may be few; rows without any would only be padding.
        num_documents = max(int((self._val.lengths > 1).sum()), 1)
        size = min(self.batch_size, num_documents) if self.contiguous else self.batch_size
        return self._batches(self._val, size, shuffle=False, max_windows=max_windows)

    def _batches(
        self, stream: TokenStream, size: int, *, shuffle: bool, max_windows: int | None = None
    ) -> BatchSource:
        if self.contiguous:
            return ContiguousBatches(
                stream,
                seq_len=self.seq_len,
                num_rows=size,
                shuffle=shuffle,
                seed=self.seed,
                max_windows=max_windows,
            )
        return WindowBatches(
            stream,
            seq_len=self.seq_len,
            batch_size=size,
            reset_at_documents=self.reset_at_documents,
            shuffle=shuffle,
            seed=self.seed,
            max_windows=max_windows,
        )
