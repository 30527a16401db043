"""Evaluation: perplexity by position on long documents, and recall on MQAR."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.decoder import MemoryLM
from .data.mqar import MQARConfig, accuracy_per_example, mqar
from .statistics import PairedDifference, paired_difference

# Dimensions: W windows, T tokens of a window, V vocabulary

# Tokens read at once: bounds the memory of attention and logits, changes no number.
DEFAULT_CHUNK = 1024
# Tokens whose losses are taken at once: their logits in float32 stay in the processor's cache.
LOSS_CHUNK = 32


@dataclass(frozen=True)
class PositionLosses:
    """Next-token losses of the windows of one document.

    Attributes:
        losses: (W, T) float32, in nats; column t is the loss of predicting token t + 1 of the window from the
            t + 1 before.
        starts: position of each window in the document.
        seconds: time of the whole evaluation.
    """

    losses: Tensor
    starts: tuple[int, ...]
    seconds: float

    @property
    def window_losses(self) -> list[float]:
        """Mean loss of each window, the figures to compare in pairs."""
        return [float(value) for value in self.losses.double().mean(dim=1)]

    @property
    def loss(self) -> float:
        return float(self.losses.double().mean())

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def buckets(self, edges: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Losses by position in the window.

        Args:
            edges: ascending borders from 0 to T; None doubles from 64.

        Returns:
            per bucket: first and last position, mean loss, perplexity, and the mean loss of every window.
        """
        length = self.losses.shape[1]
        edges = position_edges(length) if edges is None else list(edges)
        if len(edges) < 2 or edges[0] < 0 or edges[-1] > length or sorted(set(edges)) != list(edges):
            raise ValueError(f"edges must ascend within 0 .. {length}, got {edges}.")
        found = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            part = self.losses[:, low:high].double()
            found.append(
                {
                    "first": low,
                    "last": high - 1,
                    "loss": float(part.mean()),
                    "perplexity": perplexity_of(float(part.mean())),
                    "window_losses": [float(value) for value in part.mean(dim=1)],
                }
            )
        return found

    def to_dict(self, edges: Sequence[int] | None = None) -> dict[str, Any]:
        """Plain data for a record."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "num_windows": len(self.starts),
            "window_size": self.losses.shape[1],
            "starts": list(self.starts),
            "window_losses": self.window_losses,
            "by_position": self.buckets(edges),
            "tokens_per_second": self.losses.numel() / max(self.seconds, 1e-9),
        }


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds: broken models lose more than 709 nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def position_edges(length: int) -> list[int]:
    """Borders of the default position buckets: 0, 64, 128, 256, ... up to ``length``."""
    edges, edge = [0], 64
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


@torch.no_grad()
def position_losses(
    model: MemoryLM,
    tokens: Tensor,
    *,
    window_size: int = 1024,
    num_windows: int | None = None,
    first_token: int = 0,
    chunk_size: int = DEFAULT_CHUNK,
    on_window: Callable[[int, int], None] | None = None,
) -> PositionLosses:
    """Losses of a model over non-overlapping windows of one document; every window starts with an empty
    memory.

    Args:
        model: the model; it is put into evaluation mode for the call.
        tokens: (L,) the document.
        window_size: predicted tokens per window (T).
        num_windows: windows to read; None reads all that fit.
        first_token: where the first window starts.
        chunk_size: tokens per call of the model; the state is carried from call to call.
        on_window: called with (windows done, windows in all), for a progress line.

    Raises:
        ValueError: the document is too short for the windows asked for.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be one document of shape (L,), got {tuple(tokens.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    starts = window_starts(len(tokens), window_size, num_windows, first_token)
    device = model.embed_tokens.weight.device
    losses = torch.empty(len(starts), window_size)
    was_training = model.training
    model.eval()
    clock = time.monotonic()
    try:
        for number, start in enumerate(starts):
            window = tokens[start : start + window_size + 1].to(device)
            losses[number] = _window_losses(model, window, chunk_size)
            if on_window is not None:
                on_window(number + 1, len(starts))
    finally:
        model.train(was_training)
    return PositionLosses(losses, starts, time.monotonic() - clock)


def window_starts(
    num_tokens: int, window_size: int, num_windows: int | None = None, first_token: int = 0
) -> tuple[int, ...]:
    """Where the windows of a document start; arguments as in `position_losses`.

    Raises:
        ValueError: sizes out of range, or a document that is too short for the windows asked for.
    """
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}.")
    if first_token < 0 or (num_windows is not None and num_windows < 1):
        raise ValueError(f"need first_token >= 0 and num_windows >= 1, got {first_token} and {num_windows}.")
    fitting = max(num_tokens - 1 - first_token, 0) // window_size
    wanted = fitting if num_windows is None else num_windows
    if wanted < 1 or wanted > fitting:
        raise ValueError(
            f"the document has {num_tokens} tokens, room for {fitting} windows of {window_size} from "
            f"token {first_token} on; {max(wanted, 1)} were asked for. Use fewer or shorter windows."
        )
    return tuple(first_token + number * window_size for number in range(wanted))


def _window_losses(model: MemoryLM, window: Tensor, chunk_size: int) -> Tensor:
    """Losses (T,) of predicting window[1:] from window[:-1], read in chunks."""
    length = len(window) - 1
    # One result from the start: small ones kept from every chunk would lie between freed logits, and the
    # allocator of the C library then takes fresh memory for each chunk.
    losses, state = torch.empty(length), None
    for low in range(0, length, chunk_size):
        high = min(low + chunk_size, length)
        out = model(window[None, low:high], state, return_state=high < length)
        state = out.state
        for start in range(low, high, LOSS_CHUNK):
            stop = min(start + LOSS_CHUNK, high)
            logits = out.logits[0, start - low : stop - low].float()
            losses[start:stop] = F.cross_entropy(logits, window[start + 1 : stop + 1], reduction="none")
    return losses


@torch.no_grad()
def recall_on_mqar(model: MemoryLM, config: MQARConfig, *, batch_size: int = 100) -> dict[str, Any]:
    """Accuracy on one MQAR segment.

    Returns:
        ``accuracy`` (mean over examples), its standard error over examples, and ``num_examples``.

    Raises:
        ValueError: a batch size below 1, or a model with too small a vocabulary.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if config.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the task has {config.vocab_size} tokens, the model {model.config.vocab_size}. "
            "Evaluate with the vocabulary of training."
        )
    device = model.embed_tokens.weight.device
    inputs, labels = mqar(config)
    was_training = model.training
    model.eval()
    try:
        parts = [
            accuracy_per_example(
                model(inputs[start : start + batch_size].to(device)).logits.argmax(-1).cpu(),
                labels[start : start + batch_size],
            )
            for start in range(0, config.num_examples, batch_size)
        ]
    finally:
        model.train(was_training)
    accuracies = torch.cat(parts)
    spread = float(accuracies.std()) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None
    return {"accuracy": float(accuracies.mean()), "standard_error": spread, "num_examples": len(accuracies)}


def compare_records(a: Mapping[str, Any], b: Mapping[str, Any], confidence: float = 0.95) -> PairedDifference:
    """Paired difference ``a - b`` of two perplexity records, in nats per token.

    Raises:
        ValueError: they are no perplexity records, or not of the same windows of the same text.
    """
    for record in (a, b):
        if "window_losses" not in record["results"]:
            raise ValueError(
                f"the record of {record.get('name')!r} has no losses of windows to pair. "
                "Give two records that `memzoo evaluate perplexity` wrote."
            )
    for key in ("text", "tokenizer", "window_size", "first_token"):
        if a["config"].get(key) != b["config"].get(key):
            raise ValueError(
                f"the records cannot be paired: {key} is {a['config'].get(key)!r} in one and "
                f"{b['config'].get(key)!r} in the other. Evaluate both with the same settings."
            )
    if a["results"].get("starts") != b["results"].get("starts"):
        raise ValueError("the records cannot be paired: their windows start at different tokens.")
    return paired_difference(
        a["results"]["window_losses"], b["results"]["window_losses"], confidence=confidence
    )
