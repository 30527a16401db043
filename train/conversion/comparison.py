"""Rows of a comparison between models on the same windows of the same books, and their paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.config import ModelConfig
from ..evaluate import PositionLosses
from ..inspection import align_columns, inspect_model
from ..statistics import paired_difference

UNALIGNED_ROW = "hybrid without alignment, equal steps"
LENGTHS = (1024, 32_768, 1_000_000)  # tokens read, for the state bytes of a row
CAPTION = "perplexity by book (lower is better), state of one sequence in bfloat16, trained numbers:"


@dataclass
class Row:
    """One line of a comparison.

    Attributes:
        name: what was measured.
        config: of the model, for its state bytes.
        losses: per book.
        num_trained: trainable numbers that were tuned, 0 for none.
        recall: share of what was asked that the model recalled, see `Answers.summary`; None where nothing
            was asked.
    """

    name: str
    config: ModelConfig
    losses: dict[str, PositionLosses]
    num_trained: int = 0
    recall: dict[str, Any] | None = None


def comparison_results(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain data: every row with its losses, and the paired differences between rows, per book and over all
    books.
    """
    by_name = {row.name: row for row in rows}
    results: dict[str, Any] = {
        "rows": {
            row.name: {
                "num_trained": row.num_trained,
                "state_num_bytes": {str(n): state_bytes(row.config, n) for n in LENGTHS},
                "books": {book: losses.to_dict() for book, losses in row.losses.items()},
                **({} if row.recall is None else {"recall": row.recall}),
            }
            for row in rows
        }
    }
    control = next((row for row in rows if row.name.startswith("control")), None)
    pairs = {"branch off - hybrid": ("hybrid, memory branch off", "hybrid")}
    if control is not None:
        pairs["control - hybrid"] = (control.name, "hybrid")
    if UNALIGNED_ROW in by_name:
        pairs["without alignment - hybrid"] = (UNALIGNED_ROW, "hybrid")
    results["differences"] = {
        label: _paired(by_name[left], by_name[right]) for label, (left, right) in pairs.items()
    }
    return results


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows as text: perplexity per book, recall, state bytes at three lengths, trained parameters; then
    the differences.
    """
    books = list(rows[0].losses)
    asked = ["recall"] if rows[0].recall is not None else []
    table: list[tuple[str, ...]] = [
        ("model", *books, *asked, "state 1k", "state 32k", "state 1M", "trained"),
    ]
    for row in rows:
        table.append(
            (
                row.name,
                *(f"{row.losses[book].perplexity:.2f}" for book in books),
                *(_recall_cell(row) for _ in asked),
                *(readable_bytes(state_bytes(row.config, n)) for n in LENGTHS),
                f"{row.num_trained:,}" if row.num_trained else "-",
            )
        )
    lines = [align_columns(table, num_left=1)]
    if books:
        lines.append("")
        for label, found in comparison_results(rows)["differences"].items():
            for book, pair in found.items():
                lines.append(
                    f"{label}, {book}: {pair['mean']:+.4f} nats per token over {pair['num_pairs']} windows, "
                    f"{pair['confidence']:.0%} interval [{pair['t_low']:+.4f}, {pair['t_high']:+.4f}]"
                )
    return "\n".join(lines)


def _recall_cell(row: Row) -> str:
    return "-" if row.recall is None else f"{row.recall['accuracy']:.0%}"


def state_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Bytes of the memory of one sequence after `num_tokens` tokens, activations in bfloat16."""
    return inspect_model(config, num_tokens, dtype=torch.bfloat16)[-1].state_num_bytes


def readable_bytes(count: int) -> str:
    """1,536 -> "1.5 kB"; decimal units."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.4g} {unit}"


def _paired(left: Row, right: Row) -> dict[str, dict[str, float]]:
    found = {
        book: paired_difference(left.losses[book].window_losses, right.losses[book].window_losses).to_dict()
        for book in left.losses
    }
    if len(found) > 1:
        both = [
            [loss for book in row.losses.values() for loss in book.window_losses] for row in (left, right)
        ]
        found["all books"] = paired_difference(*both).to_dict()
    return found
