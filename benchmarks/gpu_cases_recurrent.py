"""Cases of the linear recurrences, of their relatives and of the selective scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_case import Case, Tensors, bounds_of, randn, rows_of

from memzoo.kernels import (
    LinearState,
    MLSTMState,
    SlotState,
    gated_slot_attention,
    linear_attention,
    mlstm,
    selective_scan,
    taylor_attention,
)
from memzoo.kernels.taylor_attention import num_features

# Dimensions: B batch, T tokens, N sequences


def linear_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    heads: tuple[int, int, int] = (3, 3, 3),
    widths: tuple[int, int] = (32, 32),
    decay_heads: int = 0,
    with_state: bool = False,
    normalize: bool = False,
    **options: Any,
) -> Case:
    """A case of `linear_attention`; heads of queries, keys and values."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        key, value = widths
        made = {
            "q": randn(generator, num_rows, num_tokens, heads[0], key),
            "k": randn(generator, num_rows, num_tokens, heads[1], key),
            "v": randn(generator, num_rows, num_tokens, heads[2], value),
        }
        if normalize:  # feature maps give positive queries and keys there
            made["q"], made["k"] = made["q"].abs(), made["k"].abs()
        if decay_heads:
            made["g"] = -0.25 * randn(generator, num_rows, num_tokens, decay_heads).abs()
        if with_state:
            made["memory"] = randn(generator, num_sequences, heads[2], key, value)
            if normalize:
                made["normalizer"] = 4 * randn(generator, num_sequences, heads[1], key).abs()
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        state = LinearState(tensors["memory"], tensors.get("normalizer")) if with_state else None
        out, new_state = linear_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            g=tensors.get("g"),
            normalize=normalize,
            initial_state=state,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
            **options,
        )
        assert new_state is not None
        found = {"output": out, "memory": new_state.memory, "normalizer": new_state.normalizer}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("linear_attention", name, make, call, ("g", "memory", "normalizer"))


_MLSTM_STATE = ("memory", "normalizer", "stabilizer")


def mlstm_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    widths: tuple[int, int] = (32, 32),
    with_state: bool = False,
    **options: Any,
) -> Case:
    """A case of `mlstm`; widths of keys and values."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        heads, (key, value) = (num_rows, num_tokens, 2), widths
        made = {"q": randn(generator, *heads, key), "k": randn(generator, *heads, key)}
        made |= {"v": randn(generator, *heads, value), "i": 2 * randn(generator, *heads)}
        made["f"] = randn(generator, *heads)
        if with_state:
            shape = (num_sequences, 2, key)
            made["memory"] = randn(generator, *shape, value)
            made |= {"normalizer": randn(generator, *shape), "stabilizer": randn(generator, *shape[:2])}
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        out, state = mlstm(
            *(tensors[key] for key in ("q", "k", "v", "i", "f")),
            initial_state=MLSTMState(*(tensors[part] for part in _MLSTM_STATE)) if with_state else None,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        return {"output": out, **state._asdict()}

    return Case("mlstm", name, make, call, ("i", "f", *_MLSTM_STATE))


def slots_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    heads: tuple[int, int] = (2, 2),
    widths: tuple[int, int, int] = (16, 24, 32),
    with_state: bool = False,
    **options: Any,
) -> Case:
    """A case of `gated_slot_attention`; heads of queries and of keys, widths of keys, slots and values."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        key, slots, value = widths
        made = {
            "q": randn(generator, num_rows, num_tokens, heads[0], key),
            "k": randn(generator, num_rows, num_tokens, heads[1], key),
            "v": randn(generator, num_rows, num_tokens, heads[1], value),
            "g": -0.25 * randn(generator, num_rows, num_tokens, heads[1], slots).abs(),
        }
        if with_state:
            made["keys"] = randn(generator, num_sequences, heads[1], key, slots)
            made["values"] = randn(generator, num_sequences, heads[1], slots, value)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        out, state = gated_slot_attention(
            *(tensors[key] for key in ("q", "k", "v", "g")),
            initial_state=SlotState(tensors["keys"], tensors["values"]) if with_state else None,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        return {"output": out, **state._asdict()}

    return Case("gated_slot_attention", name, make, call, ("g", "keys", "values"))


def taylor_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    widths: tuple[int, int] = (16, 32),
    layout: str = "compact",
    with_state: bool = False,
    normalize: bool = True,
) -> Case:
    """A case of `taylor_attention`; heads of queries and of keys."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "q": randn(generator, num_rows, num_tokens, heads[0], widths[0]),
            "k": randn(generator, num_rows, num_tokens, heads[1], widths[0]),
            "v": randn(generator, num_rows, num_tokens, heads[1], widths[1]),
        }
        if with_state:
            features = num_features(widths[0], layout)
            made["memory"] = randn(generator, num_sequences, heads[1], features, widths[1])
            if normalize:
                # as after many keys: the constant feature counts them, and no query brings the sum near zero
                made["normalizer"] = 0.25 * randn(generator, num_sequences, heads[1], features)
                made["normalizer"][:, :, 0] += 256
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        state = LinearState(tensors["memory"], tensors.get("normalizer")) if with_state else None
        out, new_state = taylor_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            layout=layout,
            normalize=normalize,
            initial_state=state,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
        )
        assert new_state is not None
        found = {"output": out, "memory": new_state.memory, "normalizer": new_state.normalizer}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("taylor_attention", name, make, call, ("memory", "normalizer"))


def scan_case(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    channels: int = 24,
    size: int = 16,
    groups: int = 1,
    with_state: bool = False,
    with_gate: bool = False,
) -> Case:
    """A case of `selective_scan`."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "x": randn(generator, num_rows, num_tokens, channels),
            "delta": randn(generator, num_rows, num_tokens, channels),
            "A": -randn(generator, channels, size).abs(),
            "B": randn(generator, num_rows, num_tokens, groups, size),
            "C": randn(generator, num_rows, num_tokens, groups, size),
            "delta_bias": randn(generator, channels),
        }
        if with_gate:
            made["z"] = randn(generator, num_rows, num_tokens, channels)
            made["D"] = randn(generator, channels)
        if with_state:
            made["initial_state"] = randn(generator, num_sequences, channels, size)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        y, state = selective_scan(
            **tensors,
            delta_softplus=True,
            return_state=True,
            cu_seqlens=bounds_of(lengths),
            backend=backend,
        )
        assert state is not None
        return {"y": y, "state": state}

    return Case("selective_scan", name, make, call, ("A", "D", "delta_bias", "initial_state"))
