"""The calls of every kernel that `make gpu-check` judges, and those of attention, convolutions and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_case import Case, Tensors, bounds_of, randn, rows_of
from gpu_cases_fast import fast_weights_case, titans_case, ttt_case
from gpu_cases_recurrent import linear_case, mlstm_case, scan_case, slots_case, taylor_case

from memzoo.kernels import (
    DecayPrefix,
    KVPrefix,
    SlotStream,
    attention,
    causal_conv,
    decayed_attention,
    decode_attention,
    gated_rms_norm,
    linear_cross_entropy,
    linear_divergence,
    soft_cache_size,
    union_attention,
)

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S sink or cache slots, H heads, D key width, E
# value width

# ------------------------------------------------------------------ attention


def _attention(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    width: int = 32,
    value_width: int | None = None,
    seen: Sequence[int] | None = None,
    slots: int = 0,
    sink_slots: int = 0,
    stats: bool = False,
    **options: Any,
) -> Case:
    """A case of `attention`: each sequence has `seen` so many tokens before, the last `slots` are carried."""
    num_rows, num_tokens, num_sequences = rows_of(lengths, batch, tokens)
    num_seen = torch.tensor(seen or [0] * num_sequences)

    def make(generator: torch.Generator) -> Tensors:
        value = width if value_width is None else value_width
        made = {
            "q": randn(generator, num_rows, num_tokens, heads, width),
            "k": randn(generator, num_rows, num_tokens, kv_heads, width),
            "v": randn(generator, num_rows, num_tokens, kv_heads, value),
        }
        if seen is not None:
            position = num_seen[:, None] - slots + torch.arange(slots)  # (N, P)
            for kind, size in (("k", width), ("v", value)):
                past = randn(generator, num_sequences, slots, kv_heads, size)
                past[position < 0] = float("nan")
                made[f"prefix_{kind}"] = past
                if sink_slots:
                    sinks = randn(generator, num_sequences, sink_slots, kv_heads, size)
                    for n in range(num_sequences):
                        for j in range(sink_slots):
                            if j >= int(num_seen[n]):
                                sinks[n, j] = float("nan")
                            elif bool((position[n] == j).any()):
                                sinks[n, j] = past[n, position[n] == j][0]
                    made[f"sink_{kind}"] = sinks
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        prefix = None
        if seen is not None:
            prefix = KVPrefix(
                tensors["prefix_k"],
                tensors["prefix_v"],
                num_seen,
                tensors.get("sink_k"),
                tensors.get("sink_v"),
            )
        out = attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            prefix=prefix,
            cu_seqlens=bounds_of(lengths),
            return_stats=stats,
            backend=backend,
            **options,
        )
        found = {"output": out.output, "lse": out.lse, "row_max": out.row_max}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("attention", name, make, call)


# ------------------------------------------------------------------ the others


def _conv(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    channels: int = 24,
    kernel: int = 4,
    with_bias: bool = False,
    with_tail: bool = False,
    activation: str | None = None,
) -> Case:
    num_rows, num_tokens, num_sequences = rows_of(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "x": randn(generator, num_rows, num_tokens, channels),
            "weight": randn(generator, channels, kernel),
        }
        if with_bias:
            made["bias"] = randn(generator, channels)
        if with_tail:
            made["tail"] = randn(generator, num_sequences, kernel - 1, channels)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        y, tail = causal_conv(
            tensors["x"],
            tensors["weight"],
            tensors.get("bias"),
            activation=activation,
            tail=tensors.get("tail"),
            cu_seqlens=bounds_of(lengths),
            backend=backend,
        )
        return {"y": y, "tail": tail}

    return Case("causal_conv", name, make, call)


def _decode(
    name: str,
    *,
    slots: int,
    batch: int = 3,
    heads: int = 4,
    kv_heads: int = 4,
    width: int = 32,
    value_width: int = 32,
    ragged: bool = False,
    stats: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        made = {
            "q": randn(generator, batch, 1, heads, width),
            "k": randn(generator, batch, slots, kv_heads, width),
            "v": randn(generator, batch, slots, kv_heads, value_width),
        }
        if ragged:
            valid = torch.rand(batch, slots, generator=generator) < 0.6
            valid[:, 0] = True
            made["k"][~valid] = made["v"][~valid] = float("nan")
            made["valid"] = valid
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        out = decode_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            valid=tensors.get("valid"),
            return_stats=stats,
            backend=backend,
        )
        found = {"output": out.output, "lse": out.lse, "row_max": out.row_max}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("decode_attention", name, make, call)


# ------------------------------------------------------------------ keys that fade


def _decayed(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    form: str = "age",
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 32,
    seen: Sequence[int] | None = None,
    slots: int = 0,
) -> Case:
    num_rows, num_tokens, num_sequences = rows_of(lengths, 2, tokens)
    num_seen = torch.tensor(seen or [0] * num_sequences)
    decays = heads if form == "sum" else kv_heads

    def make(generator: torch.Generator) -> Tensors:
        made = {}
        for prefix, rows, count in (("", num_rows, num_tokens), ("past ", num_sequences, slots)):
            for kind in ("k", "v"):
                made[prefix + kind] = randn(generator, rows, count, kv_heads, width)
            made[prefix + "log_decay"] = -randn(generator, rows, count, decays).abs() / 16
        empty = num_seen[:, None] - slots + torch.arange(slots) < 0  # (N, P)
        for kind in ("k", "v", "log_decay"):
            made[f"past {kind}"][empty] = float("nan")
        return made | {"q": randn(generator, num_rows, num_tokens, heads, width)}

    def call(tensors: Tensors, backend: str) -> Tensors:
        past = [tensors[f"past {kind}"] for kind in ("k", "v", "log_decay")]
        own = {kind: tensors[kind] for kind in ("q", "k", "v", "log_decay")}
        return {
            "output": decayed_attention(
                **own,
                form=form,
                prefix=None if seen is None else DecayPrefix(*past, num_seen),
                cu_seqlens=bounds_of(lengths),
                backend=backend,
            )
        }

    return Case("decayed_attention", name, make, call, ("log_decay", "past log_decay"))


def _cache_size(name: str, *, tokens: int = 0, lengths: Sequence[int] | None = None, heads: int = 3) -> Case:
    num_rows, num_tokens, _ = rows_of(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        return {"log_retention": -randn(generator, num_rows, num_tokens, heads).abs() / 8}

    def call(tensors: Tensors, backend: str) -> Tensors:
        return {"size": soft_cache_size(**tensors, cu_seqlens=bounds_of(lengths), backend=backend)}

    return Case("soft_cache_size", name, make, call, ("log_retention",))


# ------------------------------------------------------------------ union softmax


def _union(
    name: str, *, tiles: int, queries: int, slots: int, heads: tuple[int, int] = (4, 2), width: int = 16
) -> Case:
    """A case of `union_attention`: a pool with empty slots and runs of queries, and slots of each tile."""

    def make(generator: torch.Generator) -> Tensors:
        query, own = (tiles, queries, heads[0], width), (tiles, slots, heads[1], width)
        made = {name: randn(generator, *query) for name in ("q", "other_q")}
        made |= {name: randn(generator, 2 * slots, heads[1], width) for name in ("k", "v")}
        made |= {name: randn(generator, *own) for name in ("own_k", "own_v")}
        made["index"] = torch.randint(-slots, 2 * slots, (tiles, slots), generator=generator)
        for name in ("first", "last"):
            made[name] = torch.randint(0, queries + 1, (tiles, slots), generator=generator)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        pooled = SlotStream(*(tensors[name] for name in ("q", "k", "v", "index", "first", "last")))
        own = SlotStream(*(tensors[name] for name in ("other_q", "own_k", "own_v")))
        return union_attention([pooled, own], backend=backend)._asdict()

    return Case("union_attention", name, make, call, ())


# ------------------------------------------------------------------ norm and gate


def _gated_norm(name: str, *, channels: int = 48, has_skip: bool = False, **options: Any) -> Case:
    """A case of `gated_rms_norm`."""

    def make(generator: torch.Generator) -> Tensors:
        made = {key: randn(generator, 2, 70, channels) for key in ("y", "z", "u")[: 3 if has_skip else 2]}
        return made | {key: randn(generator, channels) for key in ("weight", "f")[: 2 if has_skip else 1]}

    def call(tensors: Tensors, backend: str) -> Tensors:
        skip = (tensors["u"], tensors["f"]) if has_skip else None
        given = (tensors[key] for key in ("y", "z", "weight"))
        return {"y": gated_rms_norm(*given, skip=skip, backend=backend, **options)}

    return Case("gated_rms_norm", name, make, call)


# ------------------------------------------------------------------ losses of a linear head


def _cross_entropy(name: str, *, positions: int, vocab: int, ignored: float, chunk_size: int) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        targets = torch.randint(vocab, (positions,), generator=generator)
        targets[torch.rand(positions, generator=generator) < ignored] = -100
        return {
            "hidden": randn(generator, positions, 32),
            "weight": randn(generator, vocab, 32) / 4,
            "targets": targets,
        }

    def call(tensors: Tensors, backend: str) -> Tensors:
        return {"loss": linear_cross_entropy(**tensors, chunk_size=chunk_size, backend=backend)}

    return Case("linear_cross_entropy", name, make, call)


def _divergence(
    name: str, *, positions: int, vocab: tuple[int, int], chunk_size: int, reverse: bool = False
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {
            "hidden": randn(generator, positions, 32),
            "weight": randn(generator, vocab[0], 32) / 4,
            "teacher_hidden": randn(generator, positions, 24),
            "teacher_weight": randn(generator, vocab[1], 24) / 4,
        }

    def call(tensors: Tensors, backend: str) -> Tensors:
        return {"loss": linear_divergence(**tensors, reverse=reverse, chunk_size=chunk_size, backend=backend)}

    return Case("linear_divergence", name, make, call)


CASES: tuple[Case, ...] = (
    _attention("causal", tokens=70),
    _attention("causal, grouped heads, statistics", tokens=130, heads=6, kv_heads=2, width=40, stats=True),
    _attention("causal, wider values", tokens=66, value_width=48),
    _attention("causal, heads of 128", tokens=130, batch=1, heads=2, kv_heads=1, width=128),
    _attention("window", tokens=70, window_size=16),
    _attention("window, one key head, statistics", tokens=130, kv_heads=1, window_size=64, stats=True),
    _attention("window, heads of 128", tokens=200, batch=1, heads=2, kv_heads=2, width=128, window_size=128),
    _attention("window and sinks, statistics", tokens=160, window_size=33, num_sinks=4, stats=True),
    _attention("window that ends with a cell", tokens=70, window_size=32, window_grid=16),
    _attention("packed", lengths=(37, 1, 0, 64, 28), kv_heads=2),
    _attention("packed, window", lengths=(37, 1, 0, 64, 28), window_size=16),
    _attention("packed, window and sinks", lengths=(37, 1, 0, 64, 28), window_size=16, num_sinks=3),
    _attention("prefix", tokens=40, seen=(90, 90), slots=90),
    _attention("prefix, one token, window", tokens=1, kv_heads=2, seen=(200, 200), slots=63, window_size=64),
    _attention("prefix, unequal pasts, window", tokens=20, seen=(5, 100), slots=32, window_size=32),
    _attention(
        "prefix, unequal pasts, window and sinks, statistics",
        tokens=20,
        kv_heads=2,
        seen=(3, 100),
        slots=32,
        sink_slots=4,
        window_size=32,
        num_sinks=4,
        stats=True,
    ),
    _attention(
        "prefix, packed, window and sinks",
        lengths=(10, 0, 33, 1),
        seen=(0, 3, 77, 50),
        slots=24,
        sink_slots=2,
        window_size=24,
        num_sinks=2,
    ),
    linear_case("no decay", tokens=130),
    linear_case("one token", tokens=1, with_state=True),
    linear_case("decay per head, state", tokens=100, decay_heads=3, with_state=True),
    linear_case("odd widths, small chunks", tokens=70, widths=(24, 40), decay_heads=3, chunk_size=16),
    linear_case("normalised, state", tokens=65, normalize=True, with_state=True),
    linear_case(
        "normalised, decay, grouped queries", tokens=65, heads=(6, 2, 2), decay_heads=2, normalize=True
    ),
    linear_case("grouped values, decay per value head", tokens=65, heads=(2, 2, 4), decay_heads=4),
    linear_case("packed, state", lengths=(37, 0, 1, 64, 20), with_state=True),
    linear_case("packed, decay, state", lengths=(37, 0, 1, 64, 20), decay_heads=3, with_state=True),
    mlstm_case("no state", tokens=130),
    mlstm_case("one token", tokens=1, with_state=True),
    mlstm_case("odd widths, small chunks, state", tokens=70, widths=(24, 40), with_state=True, chunk_size=16),
    mlstm_case("packed, state", lengths=(37, 0, 1, 64, 20), with_state=True),
    slots_case("no state", tokens=70),
    slots_case("grouped heads, state", tokens=45, heads=(4, 2), with_state=True),
    slots_case("packed, small chunks, state", lengths=(33, 0, 1, 20), with_state=True, chunk_size=16),
    slots_case("one token, state", tokens=1, with_state=True),
    fast_weights_case("internal", tokens=45, chunk_size=16),
    fast_weights_case(
        "l2, odd widths, state", tokens=21, widths=(19, 7), seen=(5, 9), chunk_size=8, loss="l2"
    ),
    fast_weights_case("one token, two end a chunk", tokens=1, seen=(7, 15), chunk_size=8),
    fast_weights_case("packed, pre, mlp", lengths=(17, 0, 1, 20), net="mlp", fast_norm="pre", chunk_size=8),
    fast_weights_case(
        "post, a chunk of several blocks", tokens=150, widths=(64, 128), chunk_size=70, fast_norm="post"
    ),
    taylor_case("plain", tokens=70),
    taylor_case("grouped heads, state", tokens=45, heads=(4, 2), with_state=True),
    taylor_case(
        "expanded, narrow heads, state", tokens=40, widths=(5, 19), layout="expanded", with_state=True
    ),
    taylor_case("not normalised, packed, state", lengths=(33, 0, 1, 20), normalize=False, with_state=True),
    taylor_case("one token, state", tokens=1, batch=3, with_state=True),
    _conv("plain", tokens=70),
    _conv("bias, silu, tail", tokens=70, with_bias=True, with_tail=True, activation="silu"),
    _conv("one token, tail", tokens=1, kernel=3, with_tail=True),
    _conv("packed, shorter than the kernel", lengths=(2, 0, 1, 50), with_tail=True, activation="silu"),
    _decode("one slot", slots=1),
    _decode("many slots", slots=200, width=64, value_width=64),
    _decode("grouped heads, odd widths", slots=65, heads=6, kv_heads=2, width=40, value_width=24),
    _decode("invalid slots, statistics", slots=70, heads=4, kv_heads=1, ragged=True, stats=True),
    _decayed("per key", tokens=70),
    _decayed("per key, prefix, packed", lengths=(10, 0, 33, 1), seen=(0, 3, 40, 7), slots=40),
    _decayed("per token", tokens=70, form="sum"),
    _decayed("per token, prefix", tokens=21, form="sum", heads=3, kv_heads=3, seen=(5, 9), slots=9),
    _cache_size("dense", tokens=150),
    _cache_size("packed", lengths=(70, 0, 1, 64, 20), heads=2),
    _cross_entropy("all labelled", positions=70, vocab=101, ignored=0.0, chunk_size=70),
    _cross_entropy("few labelled, small chunks", positions=130, vocab=101, ignored=0.8, chunk_size=7),
    _cross_entropy("none labelled", positions=20, vocab=10, ignored=1.1, chunk_size=16),
    _divergence("one vocabulary", positions=70, vocab=(101, 101), chunk_size=16),
    _divergence("a larger teacher", positions=40, vocab=(96, 101), chunk_size=64),
    _divergence("a larger student", positions=40, vocab=(104, 101), chunk_size=13),
    _divergence("reversed", positions=40, vocab=(101, 101), chunk_size=13, reverse=True),
    ttt_case("linear net", tokens=70),
    ttt_case("linear net, packed, open mini-batches", lengths=(17, 0, 1, 20), positions=(0, 3, 7, 5)),
    ttt_case("net with a hidden layer", tokens=37, hidden=24, positions=(2, 2)),
    ttt_case("one token", tokens=1, positions=(7, 3)),
    titans_case("gates per chunk", tokens=37, positions=(2, 2)),
    titans_case("moving base, packed", lengths=(17, 0, 1, 20), positions=(0, 3, 7, 5), rebase_size=16),
    titans_case("gates per token", tokens=37, positions=(2, 2), per_token=True, loss_scale=1 / 16),
    titans_case("gates per token, one token", tokens=1, positions=(7, 3), per_token=True),
    _union("chunks", tiles=5, queries=7, slots=9),
    _union("single tokens, odd width", tiles=6, queries=1, slots=33, heads=(3, 1), width=20),
    _gated_norm("gate first"),
    _gated_norm("groups, skip", num_groups=3, has_skip=True),
    _gated_norm("norm first, sigmoid", norm_before_gate=True, activation="sigmoid"),
    scan_case("plain", tokens=70),
    scan_case("groups, skip and gate", tokens=33, groups=3, with_gate=True),
    scan_case("one token, state", tokens=1, with_state=True),
    scan_case("odd sizes, state", tokens=37, channels=5, size=3, with_state=True, with_gate=True),
    scan_case("packed, state", lengths=(17, 0, 1, 20), with_state=True),
)
