"""A streamed data set for Lightning."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule

from .batches import ResumableLoader, check_ids, check_loader_settings, refuse_processes
from .datasets_source import DatasetSource, stream_dataset
from .documents import TextEncoder, check_text_file, names
from .streaming import StreamedWindows, StreamLoader
from .tokenizers import BYTES
from .windows import TokenStream, WindowBatches, check_length, check_window_settings


class StreamDataModule(LightningDataModule):
    """Language-model batches from a data set that is read while training and never stored as a whole.

    Documents are encoded as they come and cut into windows, which are drawn from a buffer of
    ``shuffle_buffer`` windows. An epoch is ``batches_per_epoch`` batches; the next one goes on in the data
    set, and at its end the data set is read anew. A resumed run goes on with the very next batch. One
    training process reads, without workers.

    Args:
        dataset: what to read, one document per row.
        val_dataset: a data set for validation; as much of its beginning is read as ``max_val_windows`` need.
        val_texts: names of bundled texts for validation, or one name.
        val_files: ``.txt`` or ``.jsonl`` files for validation, or the name of one.
        text_field: field of a row that holds the text.
        tokenizer: ``"bytes"``, a folder with a tokenizer, a ``.gguf`` file, or ``"smollm2-135m"``.
        seq_len: tokens per window.
        batch_size: windows per batch.
        batches_per_epoch: batches that count as one epoch.
        max_val_windows: windows read by a validation.
        shuffle_buffer: windows read ahead to draw from; 1 keeps the order of the data set.
        reset_at_documents: whether documents are separate sequences inside a window.
        append_eos: end every document with the tokenizer's end-of-text token.
        seed: seed of the draws.

    Raises:
        ValueError: nothing to validate on, a data set that is not there, too little text for one window, or
            several training processes.
    """

    def __init__(
        self,
        dataset: DatasetSource,
        val_dataset: DatasetSource | None = None,
        val_texts: Sequence[str] | str = (),
        val_files: Sequence[str] | str = (),
        text_field: str = "text",
        tokenizer: str = BYTES,
        seq_len: int = 512,
        batch_size: int = 8,
        batches_per_epoch: int = 1000,
        max_val_windows: int = 64,
        shuffle_buffer: int = 1000,
        reset_at_documents: bool = True,
        append_eos: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=0, seed=seed)
        check_window_settings(seq_len=seq_len, max_val_windows=max_val_windows)
        for name, value in (("batches_per_epoch", batches_per_epoch), ("shuffle_buffer", shuffle_buffer)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if val_dataset is None and not val_texts and not val_files:
            raise ValueError(
                "a stream has no end to hold out. Give val_dataset (another split, or the first rows with "
                "max_rows, which dataset then leaves out with skip_rows), val_texts or val_files."
            )
        self.dataset, self.val_dataset = dataset, val_dataset
        self.val_texts, self.val_files = names(val_texts), names(val_files)
        for file in self.val_files:
            check_text_file(file)
        self.encoder = TextEncoder(tokenizer, append_eos=append_eos, text_field=text_field)
        self.tokenizer = self.encoder.tokenizer
        self.seq_len, self.batch_size, self.batches_per_epoch = seq_len, batch_size, batches_per_epoch
        self.max_val_windows, self.shuffle_buffer = max_val_windows, shuffle_buffer
        self.reset_at_documents, self.seed = reset_at_documents, seed
        self._val: TokenStream | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if self._val is not None:
            return
        refuse_processes(self.trainer, "a streamed data set")
        self._rows = stream_dataset(self.dataset, self.encoder.text_field)
        documents = self.encoder.encode_all(self.val_texts, self.val_files, None)
        if self.val_dataset is not None:
            documents += self.encoder.encode_first(self.val_dataset, self.max_val_windows * self.seq_len + 1)
        val = TokenStream.join(documents)
        check_length(val, "validation", self.seq_len)
        # what the stream will bring is not known yet, but like this text it is text of the same tokenizer
        check_ids(self.trainer, int(val.tokens.max()), self.vocab_size)
        self._val = val

    def train_dataloader(self) -> StreamLoader:
        windows = StreamedWindows(
            self._rows,
            source=self.dataset,
            text_field=self.encoder.text_field,
            encode=lambda document: self.encoder.encode([document])[0],
            seq_len=self.seq_len,
            buffer_size=self.shuffle_buffer,
            seed=self.seed,
        )
        return StreamLoader(
            windows,
            batch_size=self.batch_size,
            num_batches=self.batches_per_epoch,
            reset_at_documents=self.reset_at_documents,
        )

    def val_dataloader(self) -> ResumableLoader:
        assert self._val is not None, "setup() has not run"
        windows = WindowBatches(
            self._val,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            reset_at_documents=self.reset_at_documents,
            max_windows=self.max_val_windows,
        )
        return ResumableLoader(windows)

    def test_dataloader(self) -> ResumableLoader:
        return self.val_dataloader()
