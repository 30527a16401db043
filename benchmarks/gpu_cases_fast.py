"""Cases of the kernels whose weights learn while they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_case import Case, Tensors, bounds_of, randn, rows_of

from memzoo.kernels import (
    FastWeightState,
    TitansState,
    TTTState,
    fast_weight_scan,
    fast_weight_shapes,
    titans,
    ttt,
)

# Dimensions: B batch, T tokens, N sequences


def ttt_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    positions: tuple[int, ...] = (0, 0),
    hidden: int | None = None,
    heads: int = 2,
    width: int = 16,
    size: int = 8,
) -> Case:
    """A case of `ttt`; tokens read of the open mini-batches."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, len(positions), tokens)
    shapes = [(width, hidden or width), (1, hidden or width)]
    shapes += [] if hidden is None else [(hidden, width), (1, width)]
    parts = [(f"{kind} {i}", shape) for kind in ("weights", "pending") for i, shape in enumerate(shapes)]

    def make(generator: torch.Generator) -> Tensors:
        tokens_of = (num_rows, num_tokens, heads)
        made = {key: randn(generator, *tokens_of, width) for key in ("q", "k", "v")}
        made |= {"rate": randn(generator, *tokens_of).abs() / 16, "reader_rate": torch.ones(size).double()}
        made |= {"norm_weight": (1 + randn(generator, heads, width) / 4).bfloat16().double()}
        made |= {"norm_bias": randn(generator, heads, width) / 4}
        for part, shape in parts:
            scale = 4 if part.startswith("weights") else 16
            made[part] = randn(generator, num_sequences, heads, *shape) / scale
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        weights, pending = (
            tuple(tensors[part] for part, _ in parts if part.startswith(kind))
            for kind in ("weights", "pending")
        )
        out, state = ttt(
            **{key: x for key, x in tensors.items() if " " not in key},
            state=TTTState(weights, pending, positions),
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
        )
        assert state is not None
        found = zip((part for part, _ in parts), (*state.weights, *state.pending), strict=True)
        return {"output": out, **dict(found)}

    return Case("ttt", name, make, call, ("rate", "reader_rate", *(part for part, _ in parts)))


def titans_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    positions: tuple[int, ...] = (0, 0),
    heads: int = 2,
    width: int = 16,
    hidden: int = 24,
    **options: Any,
) -> Case:
    """A case of `titans`; tokens read of the open chunks."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, len(positions), tokens)
    shapes = [(1, width), (width, hidden), (hidden, width)]
    kinds = ["weights", "base", "momentum"] + ([] if options.get("per_token") else ["pending"])
    parts = [(f"{kind} {i}", shape) for kind in kinds for i, shape in enumerate(shapes)]
    sums = () if options.get("per_token") else ("sums",)

    def make(generator: torch.Generator) -> Tensors:
        tokens_of = (num_rows, num_tokens, heads)
        made = {key: randn(generator, *tokens_of, width) for key in ("q", "k", "v")}
        made |= {"rate": randn(generator, *tokens_of).abs() / 16, "gates": randn(generator, *tokens_of, 2)}
        for part, shape in parts:
            scale = 4 if part.startswith(("weights", "base")) else 16
            made[part] = randn(generator, num_sequences, heads, *shape) / scale
        return made | {key: randn(generator, num_sequences, heads, 2) for key in sums}

    def call(tensors: Tensors, backend: str) -> Tensors:
        nets = {
            kind: tuple(tensors[part] for part, _ in parts if part.startswith(kind))
            for kind in ("weights", "base", "momentum", "pending")
        }
        out, state = titans(
            **{key: tensors[key] for key in ("q", "k", "v", "rate", "gates")},
            state=TitansState(**nets, gates=tensors.get("sums"), position=positions),
            chunk_size=8,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        flat = (*state.weights, *state.base, *state.momentum, *state.pending)
        found = dict(zip((part for part, _ in parts), flat, strict=True))
        return {"output": out, **found} | ({} if state.gates is None else {"sums": state.gates})

    return Case("titans", name, make, call, ("rate", "gates", *sums, *(part for part, _ in parts)))


def fast_weights_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    widths: tuple[int, int] = (16, 24),
    net: str = "swiglu",
    seen: Sequence[int] | None = None,
    **options: Any,
) -> Case:
    """A case of `fast_weight_scan`; widths of heads and of the hidden layer, tokens read before."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, 2, tokens)
    shapes = fast_weight_shapes(net, *widths)
    num_entries = sum(rows * columns for rows, columns in shapes)

    def make(generator: torch.Generator) -> Tensors:
        heads = (num_rows, num_tokens, 2)
        made = {key: randn(generator, *heads, widths[0]) / 4 for key in ("q", "k", "v")}
        made["rates"] = randn(generator, *heads, len(shapes)).abs() / 64
        made["mu"] = randn(generator, *heads).abs().clamp(max=2) / 2
        made |= {f"net{i}": randn(generator, 2, *shape) / 4 for i, shape in enumerate(shapes)}
        if seen is not None:
            made["weights"] = randn(generator, num_sequences, 2, num_entries) / 4
            made["pending"] = randn(generator, num_sequences, 2, num_entries) / 64
            made["momentum"] = randn(generator, num_sequences, 2, num_entries) / 64
            made["momentum_sum"] = randn(generator, num_sequences, 2).abs()
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        state = None
        if seen is not None:
            held = ("weights", "pending", "momentum", "momentum_sum")
            state = FastWeightState(num_tokens=torch.tensor(seen), **{key: tensors[key] for key in held})
        out, after = fast_weight_scan(
            *(tensors[key] for key in ("q", "k", "v", "rates", "mu")),
            [tensors[f"net{i}"] for i in range(len(shapes))],
            net=net,
            initial_state=state,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
            **options,
        )
        assert after is not None
        return {"output": out, "weights": after.weights, "pending": after.pending}

    wide = ("rates", "mu", "weights", "pending", "momentum", "momentum_sum")
    return Case("fast_weight_scan", name, make, call, (*wide, *(f"net{i}" for i in range(len(shapes)))))
