"""Calls of every kernel with inputs that reach its corners, and the rule that judges a backend on them.

Truth is the `reference` of the operation in float64 on the CPU. Inputs are numbers that bfloat16 holds
exactly, so that one truth serves every precision; slots that must never be read hold NaN.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from memzoo.kernels import (
    DecayPrefix,
    FastWeightState,
    KVPrefix,
    LinearState,
    MLSTMState,
    SlotState,
    SlotStream,
    TitansState,
    TTTState,
    attention,
    causal_conv,
    decayed_attention,
    decode_attention,
    fast_weight_scan,
    fast_weight_shapes,
    gated_slot_attention,
    linear_attention,
    linear_cross_entropy,
    linear_divergence,
    mlstm,
    selective_scan,
    soft_cache_size,
    taylor_attention,
    titans,
    ttt,
    union_attention,
)
from memzoo.kernels.taylor_attention import num_features
from memzoo.testing import ContractError, assert_close

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S sink or cache slots, H heads, D key width, E
# value width

Tensors = dict[str, Tensor]

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to max(1, largest true value)
BFLOAT16_FACTORS = {"output": 2.0, "gradient": 3.0}  # of the error that the reference makes in bfloat16


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: name in `memzoo.kernels.backend.OPERATIONS`.
        name: what is special about the call.
        make: draws the inputs, float64 on the CPU; floating-point inputs get gradients.
        call: runs the operation on inputs with a backend.
        accumulators: inputs that are float32 where the activations are bfloat16.
    """

    operation: str
    name: str
    make: Callable[[torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensors]
    accumulators: tuple[str, ...] = ()

    @cached_property
    def inputs(self) -> Tensors:
        """Inputs of this case, the same in every run."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(f"{self.operation} {self.name}".encode())))

    @cached_property
    def truth(self) -> Tensors:
        """Outputs and gradients by the definition in float64."""
        return self.run("reference", torch.float64, torch.device("cpu"))

    @cached_property
    def bfloat16_reference(self) -> Tensors:
        """What the definition gives in bfloat16."""
        return self.run("reference", torch.bfloat16, torch.device("cpu"))

    def run(self, backend: str, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Outputs ("output ...") and gradients ("gradient ...") of the call, as float64 on the CPU."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves: Tensors = {}
        for name, tensor in self.inputs.items():
            if tensor.is_floating_point():
                own = wide if name in self.accumulators else dtype
                leaves[name] = tensor.clone().to(device, own).requires_grad_()
            else:
                leaves[name] = tensor.to(device)
        outputs = self.call(leaves, backend)
        found: Tensors = {f"output {name}": out.detach().cpu().double() for name, out in outputs.items()}
        loss = sum((out.double() * _weights(name, out)).sum() for name, out in outputs.items())
        assert isinstance(loss, Tensor)
        loss.backward()
        for name, leaf in leaves.items():
            if leaf.is_floating_point():
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                found[f"gradient {name}"] = grad.cpu().double()
        return found

    def check(self, backend: str, dtype: torch.dtype, device: torch.device) -> float:
        """Compare a backend with the truth.

        Returns:
            The largest error as a share of what is allowed.

        Raises:
            ContractError: an error above the bound, a value that is not finite, or a wrong shape.
            ValueError: the backend does not cover this call.
        """
        found = self.run(backend, dtype, device)
        worst = 0.0
        for name, expected in self.truth.items():
            where = f"{self.operation} {self.name}: {name}"
            if dtype in BOUNDS:
                error = assert_close(where, found[name], expected, BOUNDS[dtype])
                worst = max(worst, error / BOUNDS[dtype])
                continue
            assert_close(where, found[name], expected, float("inf"))  # shape, and finite values only
            factor = BFLOAT16_FACTORS[name.split()[0]]
            error = _largest(found[name] - expected)
            own = _largest(self.bfloat16_reference[name] - expected)
            allowed = factor * own + 1e-6
            if not error <= allowed:
                raise ContractError(
                    f"{where}: error {error:.3g}, allowed {allowed:.3g}, {factor:g} times the reference's"
                )
            worst = max(worst, error / allowed)
        return worst


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    return torch.randn(shape, generator=generator).bfloat16().double()


def _weights(name: str, out: Tensor) -> Tensor:
    """Fixed weights of an output in the loss whose gradients are compared."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return _randn(generator, *out.shape).to(out.device)


def _bounds(lengths: Sequence[int] | None) -> Tensor | None:
    return None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)


def _rows(lengths: Sequence[int] | None, batch_size: int, num_tokens: int) -> tuple[int, int, int]:
    """B, T and N of a call."""
    return (batch_size, num_tokens, batch_size) if lengths is None else (1, sum(lengths), len(lengths))


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
    num_rows, num_tokens, num_sequences = _rows(lengths, batch, tokens)
    num_seen = torch.tensor(seen or [0] * num_sequences)

    def make(generator: torch.Generator) -> Tensors:
        value = width if value_width is None else value_width
        made = {
            "q": _randn(generator, num_rows, num_tokens, heads, width),
            "k": _randn(generator, num_rows, num_tokens, kv_heads, width),
            "v": _randn(generator, num_rows, num_tokens, kv_heads, value),
        }
        if seen is not None:
            position = num_seen[:, None] - slots + torch.arange(slots)  # (N, P)
            for kind, size in (("k", width), ("v", value)):
                past = _randn(generator, num_sequences, slots, kv_heads, size)
                past[position < 0] = float("nan")
                made[f"prefix_{kind}"] = past
                if sink_slots:
                    sinks = _randn(generator, num_sequences, sink_slots, kv_heads, size)
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
            cu_seqlens=_bounds(lengths),
            return_stats=stats,
            backend=backend,
            **options,
        )
        found = {"output": out.output, "lse": out.lse, "row_max": out.row_max}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("attention", name, make, call)


# ------------------------------------------------------------------ linear attention


def _linear(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        key, value = widths
        made = {
            "q": _randn(generator, num_rows, num_tokens, heads[0], key),
            "k": _randn(generator, num_rows, num_tokens, heads[1], key),
            "v": _randn(generator, num_rows, num_tokens, heads[2], value),
        }
        if normalize:  # feature maps give positive queries and keys there
            made["q"], made["k"] = made["q"].abs(), made["k"].abs()
        if decay_heads:
            made["g"] = -0.25 * _randn(generator, num_rows, num_tokens, decay_heads).abs()
        if with_state:
            made["memory"] = _randn(generator, num_sequences, heads[2], key, value)
            if normalize:
                made["normalizer"] = 4 * _randn(generator, num_sequences, heads[1], key).abs()
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
            cu_seqlens=_bounds(lengths),
            backend=backend,
            **options,
        )
        assert new_state is not None
        found = {"output": out, "memory": new_state.memory, "normalizer": new_state.normalizer}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("linear_attention", name, make, call, ("g", "memory", "normalizer"))


# ------------------------------------------------------------------ test-time training


def _ttt(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, len(positions), tokens)
    shapes = [(width, hidden or width), (1, hidden or width)]
    shapes += [] if hidden is None else [(hidden, width), (1, width)]
    parts = [(f"{kind} {i}", shape) for kind in ("weights", "pending") for i, shape in enumerate(shapes)]

    def make(generator: torch.Generator) -> Tensors:
        tokens_of = (num_rows, num_tokens, heads)
        made = {key: _randn(generator, *tokens_of, width) for key in ("q", "k", "v")}
        made |= {"rate": _randn(generator, *tokens_of).abs() / 16, "reader_rate": torch.ones(size).double()}
        made |= {"norm_weight": (1 + _randn(generator, heads, width) / 4).bfloat16().double()}
        made |= {"norm_bias": _randn(generator, heads, width) / 4}
        for part, shape in parts:
            scale = 4 if part.startswith("weights") else 16
            made[part] = _randn(generator, num_sequences, heads, *shape) / scale
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
            cu_seqlens=_bounds(lengths),
            backend=backend,
        )
        assert state is not None
        found = zip((part for part, _ in parts), (*state.weights, *state.pending), strict=True)
        return {"output": out, **dict(found)}

    return Case("ttt", name, make, call, ("rate", "reader_rate", *(part for part, _ in parts)))


# ------------------------------------------------------------------ Titans


def _titans(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, len(positions), tokens)
    shapes = [(1, width), (width, hidden), (hidden, width)]
    kinds = ["weights", "base", "momentum"] + ([] if options.get("per_token") else ["pending"])
    parts = [(f"{kind} {i}", shape) for kind in kinds for i, shape in enumerate(shapes)]
    sums = () if options.get("per_token") else ("sums",)

    def make(generator: torch.Generator) -> Tensors:
        tokens_of = (num_rows, num_tokens, heads)
        made = {key: _randn(generator, *tokens_of, width) for key in ("q", "k", "v")}
        made |= {"rate": _randn(generator, *tokens_of).abs() / 16, "gates": _randn(generator, *tokens_of, 2)}
        for part, shape in parts:
            scale = 4 if part.startswith(("weights", "base")) else 16
            made[part] = _randn(generator, num_sequences, heads, *shape) / scale
        return made | {key: _randn(generator, num_sequences, heads, 2) for key in sums}

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
            cu_seqlens=_bounds(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        flat = (*state.weights, *state.base, *state.momentum, *state.pending)
        found = dict(zip((part for part, _ in parts), flat, strict=True))
        return {"output": out, **found} | ({} if state.gates is None else {"sums": state.gates})

    return Case("titans", name, make, call, ("rate", "gates", *sums, *(part for part, _ in parts)))


# ------------------------------------------------------------------ mLSTM

_MLSTM_STATE = ("memory", "normalizer", "stabilizer")


def _mlstm(
    name: str,
    *,
    tokens: int = 0,
    lengths: Sequence[int] | None = None,
    widths: tuple[int, int] = (32, 32),
    with_state: bool = False,
    **options: Any,
) -> Case:
    num_rows, num_tokens, num_sequences = _rows(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        heads, (key, value) = (num_rows, num_tokens, 2), widths
        made = {"q": _randn(generator, *heads, key), "k": _randn(generator, *heads, key)}
        made |= {"v": _randn(generator, *heads, value), "i": 2 * _randn(generator, *heads)}
        made["f"] = _randn(generator, *heads)
        if with_state:
            shape = (num_sequences, 2, key)
            made["memory"] = _randn(generator, *shape, value)
            made |= {"normalizer": _randn(generator, *shape), "stabilizer": _randn(generator, *shape[:2])}
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        out, state = mlstm(
            *(tensors[key] for key in ("q", "k", "v", "i", "f")),
            initial_state=MLSTMState(*(tensors[part] for part in _MLSTM_STATE)) if with_state else None,
            return_state=True,
            cu_seqlens=_bounds(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        return {"output": out, **state._asdict()}

    return Case("mlstm", name, make, call, ("i", "f", *_MLSTM_STATE))


def _slots(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        key, slots, value = widths
        made = {
            "q": _randn(generator, num_rows, num_tokens, heads[0], key),
            "k": _randn(generator, num_rows, num_tokens, heads[1], key),
            "v": _randn(generator, num_rows, num_tokens, heads[1], value),
            "g": -0.25 * _randn(generator, num_rows, num_tokens, heads[1], slots).abs(),
        }
        if with_state:
            made["keys"] = _randn(generator, num_sequences, heads[1], key, slots)
            made["values"] = _randn(generator, num_sequences, heads[1], slots, value)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        out, state = gated_slot_attention(
            *(tensors[key] for key in ("q", "k", "v", "g")),
            initial_state=SlotState(tensors["keys"], tensors["values"]) if with_state else None,
            return_state=True,
            cu_seqlens=_bounds(lengths),
            backend=backend,
            **options,
        )
        assert state is not None
        return {"output": out, **state._asdict()}

    return Case("gated_slot_attention", name, make, call, ("g", "keys", "values"))


# ------------------------------------------------------------------ union softmax


def _union(
    name: str, *, tiles: int, queries: int, slots: int, heads: tuple[int, int] = (4, 2), width: int = 16
) -> Case:
    """A case of `union_attention`: a pool with empty slots and runs of queries, and slots of each tile."""

    def make(generator: torch.Generator) -> Tensors:
        query, own = (tiles, queries, heads[0], width), (tiles, slots, heads[1], width)
        made = {name: _randn(generator, *query) for name in ("q", "other_q")}
        made |= {name: _randn(generator, 2 * slots, heads[1], width) for name in ("k", "v")}
        made |= {name: _randn(generator, *own) for name in ("own_k", "own_v")}
        made["index"] = torch.randint(-slots, 2 * slots, (tiles, slots), generator=generator)
        for name in ("first", "last"):
            made[name] = torch.randint(0, queries + 1, (tiles, slots), generator=generator)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        pooled = SlotStream(*(tensors[name] for name in ("q", "k", "v", "index", "first", "last")))
        own = SlotStream(*(tensors[name] for name in ("other_q", "own_k", "own_v")))
        return union_attention([pooled, own], backend=backend)._asdict()

    return Case("union_attention", name, make, call, ())


# ------------------------------------------------------------------ fast weights


def _fast_weights(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, 2, tokens)
    shapes = fast_weight_shapes(net, *widths)
    num_entries = sum(rows * columns for rows, columns in shapes)

    def make(generator: torch.Generator) -> Tensors:
        heads = (num_rows, num_tokens, 2)
        made = {key: _randn(generator, *heads, widths[0]) / 4 for key in ("q", "k", "v")}
        made["rates"] = _randn(generator, *heads, len(shapes)).abs() / 64
        made["mu"] = _randn(generator, *heads).abs().clamp(max=2) / 2
        made |= {f"net{i}": _randn(generator, 2, *shape) / 4 for i, shape in enumerate(shapes)}
        if seen is not None:
            made["weights"] = _randn(generator, num_sequences, 2, num_entries) / 4
            made["pending"] = _randn(generator, num_sequences, 2, num_entries) / 64
            made["momentum"] = _randn(generator, num_sequences, 2, num_entries) / 64
            made["momentum_sum"] = _randn(generator, num_sequences, 2).abs()
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
            cu_seqlens=_bounds(lengths),
            backend=backend,
            **options,
        )
        assert after is not None
        return {"output": out, "weights": after.weights, "pending": after.pending}

    wide = ("rates", "mu", "weights", "pending", "momentum", "momentum_sum")
    return Case("fast_weight_scan", name, make, call, (*wide, *(f"net{i}" for i in range(len(shapes)))))


# ------------------------------------------------------------------ Taylor attention


def _taylor(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "q": _randn(generator, num_rows, num_tokens, heads[0], widths[0]),
            "k": _randn(generator, num_rows, num_tokens, heads[1], widths[0]),
            "v": _randn(generator, num_rows, num_tokens, heads[1], widths[1]),
        }
        if with_state:
            features = num_features(widths[0], layout)
            made["memory"] = _randn(generator, num_sequences, heads[1], features, widths[1])
            if normalize:
                # as after many keys: the constant feature counts them, and no query brings the sum near zero
                made["normalizer"] = 0.25 * _randn(generator, num_sequences, heads[1], features)
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
            cu_seqlens=_bounds(lengths),
            backend=backend,
        )
        assert new_state is not None
        found = {"output": out, "memory": new_state.memory, "normalizer": new_state.normalizer}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    return Case("taylor_attention", name, make, call, ("memory", "normalizer"))


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
    num_rows, num_tokens, num_sequences = _rows(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "x": _randn(generator, num_rows, num_tokens, channels),
            "weight": _randn(generator, channels, kernel),
        }
        if with_bias:
            made["bias"] = _randn(generator, channels)
        if with_tail:
            made["tail"] = _randn(generator, num_sequences, kernel - 1, channels)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        y, tail = causal_conv(
            tensors["x"],
            tensors["weight"],
            tensors.get("bias"),
            activation=activation,
            tail=tensors.get("tail"),
            cu_seqlens=_bounds(lengths),
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
            "q": _randn(generator, batch, 1, heads, width),
            "k": _randn(generator, batch, slots, kv_heads, width),
            "v": _randn(generator, batch, slots, kv_heads, value_width),
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
    num_rows, num_tokens, num_sequences = _rows(lengths, 2, tokens)
    num_seen = torch.tensor(seen or [0] * num_sequences)
    decays = heads if form == "sum" else kv_heads

    def make(generator: torch.Generator) -> Tensors:
        made = {}
        for prefix, rows, count in (("", num_rows, num_tokens), ("past ", num_sequences, slots)):
            for kind in ("k", "v"):
                made[prefix + kind] = _randn(generator, rows, count, kv_heads, width)
            made[prefix + "log_decay"] = -_randn(generator, rows, count, decays).abs() / 16
        empty = num_seen[:, None] - slots + torch.arange(slots) < 0  # (N, P)
        for kind in ("k", "v", "log_decay"):
            made[f"past {kind}"][empty] = float("nan")
        return made | {"q": _randn(generator, num_rows, num_tokens, heads, width)}

    def call(tensors: Tensors, backend: str) -> Tensors:
        past = [tensors[f"past {kind}"] for kind in ("k", "v", "log_decay")]
        own = {kind: tensors[kind] for kind in ("q", "k", "v", "log_decay")}
        return {
            "output": decayed_attention(
                **own,
                form=form,
                prefix=None if seen is None else DecayPrefix(*past, num_seen),
                cu_seqlens=_bounds(lengths),
                backend=backend,
            )
        }

    return Case("decayed_attention", name, make, call, ("log_decay", "past log_decay"))


def _cache_size(name: str, *, tokens: int = 0, lengths: Sequence[int] | None = None, heads: int = 3) -> Case:
    num_rows, num_tokens, _ = _rows(lengths, 2, tokens)

    def make(generator: torch.Generator) -> Tensors:
        return {"log_retention": -_randn(generator, num_rows, num_tokens, heads).abs() / 8}

    def call(tensors: Tensors, backend: str) -> Tensors:
        return {"size": soft_cache_size(**tensors, cu_seqlens=_bounds(lengths), backend=backend)}

    return Case("soft_cache_size", name, make, call, ("log_retention",))


# ------------------------------------------------------------------ losses of a linear head


def _cross_entropy(name: str, *, positions: int, vocab: int, ignored: float, chunk_size: int) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        targets = torch.randint(vocab, (positions,), generator=generator)
        targets[torch.rand(positions, generator=generator) < ignored] = -100
        return {
            "hidden": _randn(generator, positions, 32),
            "weight": _randn(generator, vocab, 32) / 4,
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
            "hidden": _randn(generator, positions, 32),
            "weight": _randn(generator, vocab[0], 32) / 4,
            "teacher_hidden": _randn(generator, positions, 24),
            "teacher_weight": _randn(generator, vocab[1], 24) / 4,
        }

    def call(tensors: Tensors, backend: str) -> Tensors:
        return {"loss": linear_divergence(**tensors, reverse=reverse, chunk_size=chunk_size, backend=backend)}

    return Case("linear_divergence", name, make, call)


# ------------------------------------------------------------------ selective scan


def _scan(
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
    num_rows, num_tokens, num_sequences = _rows(lengths, batch, tokens)

    def make(generator: torch.Generator) -> Tensors:
        made = {
            "x": _randn(generator, num_rows, num_tokens, channels),
            "delta": _randn(generator, num_rows, num_tokens, channels),
            "A": -_randn(generator, channels, size).abs(),
            "B": _randn(generator, num_rows, num_tokens, groups, size),
            "C": _randn(generator, num_rows, num_tokens, groups, size),
            "delta_bias": _randn(generator, channels),
        }
        if with_gate:
            made["z"] = _randn(generator, num_rows, num_tokens, channels)
            made["D"] = _randn(generator, channels)
        if with_state:
            made["initial_state"] = _randn(generator, num_sequences, channels, size)
        return made

    def call(tensors: Tensors, backend: str) -> Tensors:
        y, state = selective_scan(
            **tensors,
            delta_softplus=True,
            return_state=True,
            cu_seqlens=_bounds(lengths),
            backend=backend,
        )
        assert state is not None
        return {"y": y, "state": state}

    return Case("selective_scan", name, make, call, ("A", "D", "delta_bias", "initial_state"))


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
    _linear("no decay", tokens=130),
    _linear("one token", tokens=1, with_state=True),
    _linear("decay per head, state", tokens=100, decay_heads=3, with_state=True),
    _linear("odd widths, small chunks", tokens=70, widths=(24, 40), decay_heads=3, chunk_size=16),
    _linear("normalised, state", tokens=65, normalize=True, with_state=True),
    _linear("normalised, decay, grouped queries", tokens=65, heads=(6, 2, 2), decay_heads=2, normalize=True),
    _linear("grouped values, decay per value head", tokens=65, heads=(2, 2, 4), decay_heads=4),
    _linear("packed, state", lengths=(37, 0, 1, 64, 20), with_state=True),
    _linear("packed, decay, state", lengths=(37, 0, 1, 64, 20), decay_heads=3, with_state=True),
    _mlstm("no state", tokens=130),
    _mlstm("one token", tokens=1, with_state=True),
    _mlstm("odd widths, small chunks, state", tokens=70, widths=(24, 40), with_state=True, chunk_size=16),
    _mlstm("packed, state", lengths=(37, 0, 1, 64, 20), with_state=True),
    _slots("no state", tokens=70),
    _slots("grouped heads, state", tokens=45, heads=(4, 2), with_state=True),
    _slots("packed, small chunks, state", lengths=(33, 0, 1, 20), with_state=True, chunk_size=16),
    _slots("one token, state", tokens=1, with_state=True),
    _fast_weights("internal", tokens=45, chunk_size=16),
    _fast_weights("l2, odd widths, state", tokens=21, widths=(19, 7), seen=(5, 9), chunk_size=8, loss="l2"),
    _fast_weights("one token, two end a chunk", tokens=1, seen=(7, 15), chunk_size=8),
    _fast_weights("packed, pre, mlp", lengths=(17, 0, 1, 20), net="mlp", fast_norm="pre", chunk_size=8),
    _taylor("plain", tokens=70),
    _taylor("grouped heads, state", tokens=45, heads=(4, 2), with_state=True),
    _taylor("expanded, narrow heads, state", tokens=40, widths=(5, 19), layout="expanded", with_state=True),
    _taylor("not normalised, packed, state", lengths=(33, 0, 1, 20), normalize=False, with_state=True),
    _taylor("one token, state", tokens=1, batch=3, with_state=True),
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
    _ttt("linear net", tokens=70),
    _ttt("linear net, packed, open mini-batches", lengths=(17, 0, 1, 20), positions=(0, 3, 7, 5)),
    _ttt("net with a hidden layer", tokens=37, hidden=24, positions=(2, 2)),
    _ttt("one token", tokens=1, positions=(7, 3)),
    _titans("gates per chunk", tokens=37, positions=(2, 2)),
    _titans("moving base, packed", lengths=(17, 0, 1, 20), positions=(0, 3, 7, 5), rebase_size=16),
    _titans("gates per token", tokens=37, positions=(2, 2), per_token=True, loss_scale=1 / 16),
    _titans("gates per token, one token", tokens=1, positions=(7, 3), per_token=True),
    _scan("plain", tokens=70),
    _scan("groups, skip and gate", tokens=33, groups=3, with_gate=True),
    _scan("one token, state", tokens=1, with_state=True),
    _scan("odd sizes, state", tokens=37, channels=5, size=3, with_state=True, with_gate=True),
    _scan("packed, state", lengths=(17, 0, 1, 20), with_state=True),
    _union("chunks", tiles=5, queries=7, slots=9),
    _union("single tokens, odd width", tiles=6, queries=1, slots=33, heads=(3, 1), width=20),
)
