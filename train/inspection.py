"""What a model is made of: parameters, state bytes and FLOPs per layer, without building its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.config import ModelConfig
from ..models.decoder import MemoryLM


@dataclass(frozen=True)
class LayerFacts:
    """One row of the table.

    Attributes:
        name: ``embedding``, ``layers.3``, ``head``.
        kind: type of the mixer and of the MLP.
        num_parameters: weights; a head tied to the embedding has none of its own.
        state_num_bytes: memory of one sequence after the context.
        flops_per_token: matrix-product FLOPs of the next token after the context.
    """

    name: str
    kind: str
    num_parameters: int
    state_num_bytes: int
    flops_per_token: int


def inspect_model(
    config: ModelConfig, num_tokens: int = 4096, *, dtype: torch.dtype = torch.float32
) -> list[LayerFacts]:
    """Facts of every layer, with the total as the last row.

    Args:
        config: the model; it is built on the meta device, so any size is free.
        num_tokens: context length.
        dtype: of the activations, which stored tokens keep.

    Raises:
        ValueError: a negative context length.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}.")
    model = MemoryLM(config, device="meta")
    rows = [LayerFacts("embedding", "table", model.embed_tokens.weight.numel(), 0, 0)]
    for index, block in enumerate(model.blocks):
        mlp = config.mlps[index]
        kind = config.mixers[index].type + ("" if mlp["type"] == "none" else f" + {mlp['type']}")
        num_mlp = 0 if block.mlp is None else sum(weight.numel() for weight in block.mlp.parameters())
        rows.append(
            LayerFacts(
                f"layers.{index}",
                kind,
                sum(parameter.numel() for parameter in block.parameters()),
                block.mixer.state_num_bytes(num_tokens, 1, dtype),
                block.mixer.flops_per_token(num_tokens) + 2 * num_mlp,
            )
        )
    norm = sum(parameter.numel() for parameter in model.norm.parameters())
    own_head = 0 if model.lm_head is None else model.lm_head.weight.numel()
    head_flops = 2 * config.vocab_size * config.d_model
    rows.append(
        LayerFacts("head", "tied" if model.lm_head is None else "linear", norm + own_head, 0, head_flops)
    )
    rows.append(
        LayerFacts(
            "total",
            "",
            sum(row.num_parameters for row in rows),
            sum(row.state_num_bytes for row in rows),
            sum(row.flops_per_token for row in rows),
        )
    )
    return rows


def facts_table(rows: list[LayerFacts]) -> str:
    """The rows as text, columns aligned."""
    header = ("layer", "kind", "parameters", "state bytes", "FLOPs/token")
    cells = [
        header,
        *(
            (
                row.name,
                row.kind,
                f"{row.num_parameters:,}",
                f"{row.state_num_bytes:,}",
                f"{row.flops_per_token:,}",
            )
            for row in rows
        ),
    ]
    return align_columns(cells, num_left=2)


def align_columns(cells: Sequence[tuple[str, ...]], *, num_left: int) -> str:
    """Rows of cells as text; the first ``num_left`` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
