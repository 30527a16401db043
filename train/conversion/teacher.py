"""What a frozen teacher made of the text, kept on disk: a second run over it costs only its head."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...models.checkpoints.errors import CheckpointError
from ...models.checkpoints.files import atomic_path
from ...models.checkpoints.safetensors_files import read_safetensors, write_safetensors_in_place
from ...models.decoder import MemoryLM, ModelOutput
from ..data.batches import TokenBatch

logger = logging.getLogger(__name__)

# Dimensions: B rows, T tokens, M model width, V vocabulary

DEFAULT_BYTES = 8 * 2**30


class TeacherReadings:
    """The last hidden states of a teacher for every batch it has read: M numbers per token, not the V logits.

    One file per batch, named by a digest of the teacher, of the ids and of the kind of device, so that
    folders may be shared and kept. What does not fit is read again.

    Args:
        folder: where to keep them; None keeps nothing.
        teacher_digest: of the teacher's weights, from `weights_digest`.
        max_bytes: of the folder.
    """

    def __init__(
        self, folder: Path | None = None, teacher_digest: str = "", max_bytes: int = DEFAULT_BYTES
    ) -> None:
        self.folder, self.teacher_digest = folder, teacher_digest
        self.num_bytes_left = 0 if folder is None else max_bytes
        if folder is not None and folder.is_dir():
            self.num_bytes_left -= sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    @torch.no_grad()
    def hidden(self, teacher: MemoryLM, batch: TokenBatch) -> Tensor:
        """(B, T, M), normalised; the same numbers whether the batch was read before or not."""
        path = None if self.folder is None else self.folder / f"{self._key(batch)}.safetensors"
        if path is not None and path.is_file():
            try:
                return _checked(read_safetensors(path), path).to(batch.input_ids.device)
            except (CheckpointError, KeyError) as error:
                logger.warning("%s cannot be used and is read again: %s", path, error)
        hidden = last_hidden(teacher, batch)
        size = hidden.numel() * hidden.element_size()
        # what is not finite stops the run; it is not for others to find
        if path is not None and size <= self.num_bytes_left and bool(torch.isfinite(hidden).all()):
            self._keep(path, hidden, size)
        return hidden

    def _keep(self, path: Path, hidden: Tensor, size: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                kept = hidden.cpu().contiguous()
                write_safetensors_in_place(temporary, {"hidden": kept, "sha256": _sha256(kept)})
        except OSError as error:  # a full disk costs time, not the run
            logger.warning("what the teacher read is not kept: %s", error)
            self.num_bytes_left = 0
            return
        self.num_bytes_left -= size

    def _key(self, batch: TokenBatch) -> str:
        digest = hashlib.sha256(f"{self.teacher_digest} {batch.input_ids.device.type}".encode())
        for part in (batch.input_ids, batch.cu_seqlens, batch.mask):
            digest.update(b"none" if part is None else f"{part.dtype}{tuple(part.shape)}".encode())
            if part is not None:
                digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:40]


def _sha256(hidden: Tensor) -> Tensor:
    digest = hashlib.sha256(hidden.view(torch.uint8).numpy().data).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def _checked(kept: dict[str, Tensor], path: Path) -> Tensor:
    """The hidden states of a file; raises CheckpointError when they are not those that were written."""
    if not torch.equal(_sha256(kept["hidden"]), kept["sha256"]):
        raise CheckpointError(f"{path} differs from its SHA-256.")
    return kept["hidden"]


def last_hidden(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """(B, T, M), what the head reads; the head itself is not run but for one token."""
    hidden: Tensor = last_output(model, batch).hidden_states[0]  # type: ignore[index]  # asked for
    return hidden


def last_output(
    model: torch.nn.Module,
    batch: TokenBatch,
    overrides: Mapping[str, int] | None = None,
    *,
    return_extras: bool = False,
) -> ModelOutput:
    """What a model makes of a batch: hidden states as the head reads them, which itself reads one token."""
    out: ModelOutput = model(
        batch.input_ids,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        overrides=overrides,
        return_hidden_states="last",
        last_only=True,
        return_extras=return_extras,
    )
    return out


def weights_digest(model: MemoryLM) -> str:
    """SHA-256 over config, names, dtypes and values of all weights, in hexadecimal."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
