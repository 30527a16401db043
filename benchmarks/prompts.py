"""What caches are judged by: texts that go on, and numbers asked for; needs torch alone, so that other
environments can read it.

A row is read up to its cut and compressed there; the rest is read token by token from the compressed cache.
Of a text the tokens behind the cut are judged by their mean loss. Of a needle the number is judged, right or
wrong: `asked` has the question in the compressed context, `later` reads it after the compression.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Dimensions: N rows, L tokens of a row, V vocabulary

LATER = (
    32  # last tokens of a needle's prompt, the question among them, that `later` reads after the compression
)
KINDS = ("text", "asked", "later")


@dataclass(frozen=True)
class Part:
    """Rows that are read together.

    Attributes:
        ids: (N, L).
        first: the tokens from here on are judged.
        is_needle: whether they are the answer to a question.
    """

    ids: Tensor
    first: int
    is_needle: bool

    @property
    def cuts(self) -> dict[str, int]:
        """What is judged -> how many tokens are read before the compression."""
        return {"asked": self.first, "later": self.first - LATER} if self.is_needle else {"text": self.first}


def continued(part: Part, cut: int, logits: Tensor, step: Callable[[Tensor, int], Tensor]) -> list[float]:
    """Reads what follows the cut token by token; the loss of every row, or 1 where its number was said.

    Args:
        part: the rows.
        cut: tokens read before.
        logits: (N, 1, V) after the last of them; looked at only where the token behind the cut is judged.
        step: (N, 1) tokens and their position -> (N, 1, V).
    """
    found = [logits] if cut == part.first else []
    for position in range(cut, part.ids.shape[1] - 1):
        after = step(part.ids[:, position : position + 1], position)
        if position + 1 >= part.first:
            found.append(after)
    said, expected = torch.cat(found, dim=1).float(), part.ids[:, part.first :]
    if part.is_needle:
        return [float(row) for row in (said.argmax(-1) == expected).all(1)]
    losses = torch.nn.functional.cross_entropy(said.transpose(1, 2), expected, reduction="none")
    return [float(row) for row in losses.mean(1)]


def write_parts(path: Path, parts: Sequence[Part], settings: Mapping[str, Any]) -> str:
    """Writes the rows and what others need to know of the benchmark; the SHA-256 of the file."""
    rows = [{"ids": part.ids.tolist(), "first": part.first, "is_needle": part.is_needle} for part in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**settings, "parts": rows}), encoding="utf-8")
    return digest(path)


def read_parts(path: Path) -> tuple[list[Part], dict[str, Any]]:
    """What `write_parts` wrote: the rows, and the settings."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.pop("parts")
    return [Part(torch.tensor(row["ids"]), row["first"], row["is_needle"]) for row in rows], content


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several parts as those of one: rows behind one another, bytes of the largest."""
    found: dict[str, Any] = {kind: [row for part in parts for row in part.get(kind, ())] for kind in KINDS}
    found["bytes"] = max((part["bytes"] for part in parts if "text" in part), default=None)
    found["seconds"] = sum(part["seconds"] for part in parts)
    return found


def summary(found: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """Means with standard errors.

    Args:
        found: figures of a cache, as `joined` gives them.
        full: those of the cache that keeps everything, of the same rows.
    """
    losses = found["text"]
    above = [a - b for a, b in zip(losses, full["text"], strict=True)]
    made: dict[str, Any] = {"bytes": found["bytes"], "seconds": found["seconds"], "num_texts": len(losses)}
    made["perplexity"] = math.exp(statistics.fmean(losses)) if losses else None
    made["above_full"] = _mean(above)
    for kind in ("asked", "later"):
        made[kind] = _mean(found[kind])
    made["num_needles"] = len(found["asked"])
    return made


def _mean(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "standard_error": error}
