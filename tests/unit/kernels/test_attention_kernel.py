"""Attention: the tiled form and torch's own against the definition, and what must not pass between tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import AttentionOutput, KVPrefix, attention
from memzoo.kernels.attention import chunked
from memzoo.testing import assert_close

# A tile has 64 queries in these tests (windows up to 256): one T below, equal, above and not a multiple.
LENGTHS = [1, 5, 64, 150]
# Each: size and sinks of a window.
WINDOWS = [(None, 0), (1, 0), (7, 0), (7, 3), (100, 2), (400, 1)]


def heads(
    seed: int, rows: int, num_tokens: int, dtype: torch.dtype = torch.float64, num_kv_heads: int = 2
) -> list[Tensor]:
    """q, k, v with odd widths 5 and 3 that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, num_tokens, n, width, generator=generator, dtype=dtype).requires_grad_()
        for n, width in ((4, 5), (num_kv_heads, 5), (num_kv_heads, 3))
    ]


def run(result: AttentionOutput, inputs: list[Tensor], seed: int = 9) -> dict[str, Tensor]:
    """Outputs and the gradients of a random function of all of them."""
    outputs = {name: x for name, x in result._asdict().items() if x is not None}
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for x in outputs.values()
    )
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        outputs[f"gradient {i}"] = torch.zeros_like(x) if grad is None else grad
    return outputs


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], bound)


def make_prefix(seed: int, seen: list[int], slots: int, sinks: int, **like: torch.dtype) -> KVPrefix:
    """Random past; a position held both by a sink and by a prefix slot has one key and one value."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(seen)
    k, v, sink_k, sink_v = (
        torch.randn(rows, n, 2, width, generator=generator, dtype=like.get("dtype", torch.float64))
        for n, width in ((slots, 5), (slots, 3), (sinks, 5), (sinks, 3))
    )
    for n, count in enumerate(seen):
        for j in range(min(sinks, count)):
            slot = j - (count - slots)
            if 0 <= slot < slots:
                sink_k[n, j], sink_v[n, j] = k[n, slot], v[n, slot]
    if sinks == 0:
        return KVPrefix(k.requires_grad_(), v.requires_grad_(), torch.tensor(seen))
    return KVPrefix(
        k.requires_grad_(),
        v.requires_grad_(),
        torch.tensor(seen),
        sink_k.requires_grad_(),
        sink_v.requires_grad_(),
    )


def prefix_tensors(prefix: KVPrefix) -> list[Tensor]:
    return [x for x in (prefix.k, prefix.v, prefix.sink_k, prefix.sink_v) if x is not None]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_dense_equals_the_definition(num_tokens: int, window: tuple[int | None, int]) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        inputs = heads(1, 2, num_tokens, dtype)
        results = [
            run(
                attention(
                    *inputs, window_size=window[0], num_sinks=window[1], return_stats=True, backend=name
                ),
                inputs,
            )
            for name in ("torch", "reference")
        ]
        compare(*results, bound)


def test_definition_equals_a_written_out_mask() -> None:
    q, k, v = (x.detach() for x in heads(2, 2, 20))
    i, j = torch.arange(20)[:, None], torch.arange(20)
    visible = (j <= i) & ((i - j < 6) | (j < 2))
    k_each, v_each = (x.repeat_interleave(2, dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bihj", q, k_each) * 0.3
    logits = logits.masked_fill(~visible[:, None], float("-inf"))
    expected = torch.einsum("bihj,bjhe->bihe", logits.softmax(-1), v_each)
    for name in ("reference", "torch"):
        out = attention(q, k, v, window_size=6, num_sinks=2, scale=0.3, return_stats=True, backend=name)
        assert_close("output", out.output, expected, 1e-12)
        assert_close("lse", out.lse, logits.logsumexp(-1), 1e-12)
        assert_close("row_max", out.row_max, logits.amax(-1), 1e-12)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_sdpa_equals_the_definition(num_kv_heads: int) -> None:
    q, k, v = heads(3, 2, 70, num_kv_heads=num_kv_heads)
    v = (
        torch.cat([v, v.detach()[..., :2]], -1).detach().requires_grad_()
    )  # torch has no kernel for unequal widths
    results = [run(attention(q, k, v, backend=name), [q, k, v]) for name in ("sdpa", "torch", "reference")]
    compare(results[0], results[2], 1e-9)
    compare(results[1], results[2], 1e-9)


@pytest.mark.parametrize("num_tokens", [1, 9, 70])
@pytest.mark.parametrize("seen", [[0, 0], [2, 2], [5, 5], [1, 6], [12, 0]])
@pytest.mark.parametrize("form", [(None, 12, 0), (4, 3, 0), (4, 3, 2), (4, 8, 2), (5, 2, 3), (65, 64, 1)])
def test_prefix_equals_the_definition(
    num_tokens: int, seen: list[int], form: tuple[int | None, int, int]
) -> None:
    window_size, slots, sinks = form
    prefix = make_prefix(4, seen, slots, sinks)
    inputs = [*heads(5, 2, num_tokens), *prefix_tensors(prefix)]
    results = [
        run(
            attention(
                *inputs[:3],
                window_size=window_size,
                num_sinks=sinks,
                prefix=prefix,
                return_stats=True,
                backend=name,
            ),
            inputs,
        )
        for name in ("torch", "reference")
    ]
    compare(*results, 1e-9)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cuts", [[0, 9], [40, 1, 1, 0, 28], [64, 6]])
def test_any_split_equals_the_whole(window: tuple[int | None, int], cuts: list[int]) -> None:
    window_size, num_sinks = window
    num_tokens = sum(cuts)
    q, k, v = (x.detach() for x in heads(6, 2, num_tokens))
    whole = attention(q, k, v, window_size=window_size, num_sinks=num_sinks, return_stats=True)
    slots = num_tokens if window_size is None else max(window_size - 1, 0)
    pieces, at = [], 0
    for length in cuts:
        past_k, past_v = (F.pad(x[:, :at], (0, 0, 0, 0, slots, 0))[:, at:] for x in (k, v))
        sinks = [F.pad(x[:, : min(at, num_sinks)], (0, 0, 0, 0, 0, num_sinks))[:, :num_sinks] for x in (k, v)]
        prefix = KVPrefix(past_k, past_v, torch.tensor([at, at]), *(sinks if num_sinks else ()))
        part = slice(at, at + length)
        pieces.append(
            attention(
                q[:, part],
                k[:, part],
                v[:, part],
                window_size=window_size,
                num_sinks=num_sinks,
                prefix=prefix,
                return_stats=True,
            )
        )
        at += length
    for name in AttentionOutput._fields:
        joined = torch.cat([getattr(piece, name) for piece in pieces], 1)
        assert_close(name, joined, getattr(whole, name), 1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_packed_equals_separate(window: tuple[int | None, int], with_prefix: bool) -> None:
    lengths, seen = [3, 0, 77, 1], [0, 4, 9, 2]
    window_size, sinks = window
    prefix = make_prefix(7, seen, 12, sinks) if with_prefix else None
    inputs = heads(8, 1, sum(lengths))
    cu_seqlens = torch.tensor([0, 3, 3, 80, 81])
    packed = attention(
        *inputs,
        window_size=window_size,
        num_sinks=sinks,
        prefix=prefix,
        cu_seqlens=cu_seqlens,
        return_stats=True,
    )
    pieces = []
    for n, length in enumerate(lengths):
        start = int(cu_seqlens[n])
        own = None
        if prefix is not None:
            own = KVPrefix(*(None if x is None else x[n : n + 1] for x in prefix))
        pieces.append(
            attention(
                *(x[:, start : start + length] for x in inputs),
                window_size=window_size,
                num_sinks=sinks,
                prefix=own,
                return_stats=True,
            )
        )
    separate = AttentionOutput(*(torch.cat(parts, 1) for parts in zip(*pieces, strict=True)))
    every = inputs + ([] if prefix is None else prefix_tensors(prefix))
    compare(run(packed, every), run(separate, every), 1e-12)


def test_packed_reference_equals_the_definition_per_sequence() -> None:
    inputs = heads(10, 1, 12)
    cu_seqlens = torch.tensor([0, 5, 5, 12])
    packed = attention(*inputs, window_size=3, cu_seqlens=cu_seqlens, backend="reference").output
    parts = [
        attention(*(x[:, a:b] for x in inputs), window_size=3, backend="reference").output
        for a, b in ((0, 5), (5, 12))
    ]
    assert_close("output", packed, torch.cat(parts, 1), 0.0)


@pytest.mark.parametrize("window", [(None, 0), (7, 2), (100, 0)])
@pytest.mark.parametrize("return_stats", [False, True])
def test_causal_to_the_last_bit(window: tuple[int | None, int], return_stats: bool) -> None:
    first = heads(11, 1, 150, torch.float32)
    other = heads(12, 1, 150, torch.float32)
    for t in (1, 63, 64, 100):
        changed = [torch.cat([a[:, :t], b[:, t:]], 1) for a, b in zip(first, other, strict=True)]
        results = [
            attention(*x, window_size=window[0], num_sinks=window[1], return_stats=return_stats)
            for x in (first, changed)
        ]
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a[:, :t], b[:, :t])
        grads = torch.autograd.grad(results[0].output[:, :t].sum(), first)
        assert all(not bool(grad[:, t:].any()) for grad in grads)


def test_nothing_passes_a_packed_boundary() -> None:
    inputs = heads(13, 1, 90)
    cu_seqlens = torch.tensor([0, 20, 90])
    out = attention(*inputs, window_size=9, num_sinks=2, cu_seqlens=cu_seqlens, return_stats=True)
    grads = torch.autograd.grad(out.output[:, 20:].sum(), inputs, retain_graph=True)
    assert all(not bool(grad[:, :20].any()) for grad in grads)
    grads = torch.autograd.grad(out.lse[:, :20].sum(), inputs[:2])
    assert all(not bool(grad[:, 20:].any()) for grad in grads)
    poisoned = [torch.cat([torch.full_like(x[:, :20], float("nan")), x[:, 20:]], 1) for x in inputs]
    other = attention(*poisoned, window_size=9, num_sinks=2, cu_seqlens=cu_seqlens, return_stats=True)
    for a, b in zip(out, other, strict=True):
        assert torch.equal(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("seen", [[2, 2], [0, 0], [1, 4]])
def test_empty_slots_are_never_read(seen: list[int]) -> None:
    inputs = heads(14, 2, 6)
    clean = make_prefix(15, seen, 8, 3)
    poisoned = KVPrefix(*(x if x is None else x.detach().clone() for x in clean))
    for n, count in enumerate(seen):
        for past, sinks in ((poisoned.k, poisoned.sink_k), (poisoned.v, poisoned.sink_v)):
            past[n, : 8 - count] = float("nan")
            sinks[n, count:] = float("nan")
    for x in prefix_tensors(poisoned):
        x.requires_grad_()
    results = [
        run(
            attention(*inputs, window_size=5, num_sinks=3, prefix=prefix, return_stats=True),
            [*inputs, *prefix_tensors(prefix)],
        )
        for prefix in (poisoned, clean)
    ]
    compare(*results, 0.0)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(16)
    prefix = make_prefix(17, [2, 5], 4, 1)
    inputs = [
        torch.randn(2, 3, n, d, generator=generator, dtype=torch.float64).requires_grad_()
        for n, d in ((4, 5), (2, 5), (2, 3))
    ]

    def function(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        given = KVPrefix(past[0], past[1], prefix.num_seen, *past[2:])
        return tuple(
            attention(q, k, v, window_size=3, num_sinks=1, prefix=given, return_stats=True, backend="torch")
        )

    assert torch.autograd.gradcheck(function, [*inputs, *prefix_tensors(prefix)])


def test_tiles_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads(18, 3, 40)
    expected = run(attention(*inputs, window_size=9, num_sinks=2, return_stats=True), inputs)
    for limits in ((1, 1), (7, 200), (40, 1 << 20)):
        monkeypatch.setattr(chunked, "tile_limits", lambda window_size, on_cpu, limits=limits: limits)
        compare(
            run(attention(*inputs, window_size=9, num_sinks=2, return_stats=True), inputs), expected, 1e-12
        )


def same_precision_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int) -> Tensor:
    """Every product and the softmax rounded to the dtype of the input."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    visible = (j <= i) & (i - j < window_size)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    logits = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.matmul(weights, v).transpose(1, 2)


@pytest.mark.parametrize("window_size", [16, 200])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_bfloat16_errs_no_more_than_twice_the_plain_form(window_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(19)
    inputs = [
        (spread * torch.randn(2, 150, n, 16, generator=generator)).bfloat16().requires_grad_()
        for n in (4, 2, 2)
    ]
    cotangent = torch.randn(2, 150, 4, 16, generator=generator).bfloat16()
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]

    def all_of(output: Tensor, given: list[Tensor]) -> list[Tensor]:
        return [output, *torch.autograd.grad(output, given, cotangent.to(output.dtype))]

    exact = all_of(attention(*exact_inputs, window_size=window_size).output, exact_inputs)
    ours = all_of(attention(*inputs, window_size=window_size, backend="torch").output, inputs)
    plain = all_of(same_precision_attention(*inputs, window_size), inputs)
    for i, (a, b, c) in enumerate(zip(exact, ours, plain, strict=True)):
        assert b.dtype == torch.bfloat16
        ours_error, plain_error = (float((x.double() - a).detach().abs().max()) for x in (b, c))
        assert ours_error <= (2 if i == 0 else 3) * plain_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4, 1e-30, -1e4])
@pytest.mark.parametrize("window_size", [None, 5])
def test_extreme_inputs_stay_finite(dtype: torch.dtype, value: float, window_size: int | None) -> None:
    for constant in (True, False):
        inputs = []
        for n in (4, 2, 2):
            noise = (
                torch.ones(1, 20, n, 8)
                if constant
                else torch.randn(1, 20, n, 8, generator=torch.Generator().manual_seed(n))
            )
            inputs.append((noise * value).to(dtype).requires_grad_())
        out = attention(*inputs, window_size=window_size, return_stats=True)
        grads = torch.autograd.grad(sum(x.float().sum() for x in out), inputs)
        assert all(bool(torch.isfinite(x).all()) for x in (*out, *grads))


def test_empty_calls() -> None:
    q, k, v = (x.detach() for x in heads(20, 2, 3))
    for name in ("auto", "reference", "torch"):
        out = attention(q[:, :0], k[:, :0], v[:, :0], window_size=3, return_stats=True, backend=name)
        assert out.output.shape == (2, 0, 4, 3)
        assert out.lse.shape == out.row_max.shape == (2, 0, 4)
        packed = attention(q[:1, :0], k[:1, :0], v[:1, :0], cu_seqlens=torch.tensor([0, 0]), backend=name)
        assert packed.output.shape == (1, 0, 4, 3)


def test_memory_of_a_window_grows_with_the_length_only() -> None:
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(out.numel())
            return out

    largest = {}
    for num_tokens in (1024, 4096):
        inputs = heads(21, 1, num_tokens, torch.float32)
        seen.clear()
        with Sizes():
            out = attention(*inputs, window_size=64, num_sinks=2)
            torch.autograd.grad(out.output.sum(), inputs)
        largest[num_tokens] = max(seen)
    assert largest[4096] <= 4 * largest[1024]
    assert largest[4096] < 4096 * 64  # no scores of all tokens at once


def test_autocast_leaves_the_dtype_alone() -> None:
    inputs = heads(22, 1, 30, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(attention(*inputs, window_size=6, return_stats=True), inputs)
    compare(inside, run(attention(*inputs, window_size=6, return_stats=True), inputs), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [None, 4])
def test_compiles_without_a_break(window_size: int | None) -> None:
    inputs = heads(23, 2, 20, torch.float32)

    def function(q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        return attention(q, k, v, window_size=window_size, num_sinks=1, return_stats=window_size is not None)

    compiled = torch.compile(function, fullgraph=True)
    compare(run(compiled(*inputs), inputs), run(function(*inputs), inputs), 1e-5)


Q, K, V = (x.detach() for x in heads(24, 2, 6))
PAST = KVPrefix(K[:, :4], V[:, :4], torch.tensor([4, 4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q[0]}, r"q must have shape \(B, T, H, D\), got \(6, 4, 5\)"),
        ({"k": K[:, :3], "v": V[:, :3]}, "agree in batch and tokens"),
        ({"v": V[:, :3]}, "k and v must agree in all but their width"),
        ({"q": Q[..., :3]}, "q and k must have one width per head, got 3 and 5"),
        ({"q": Q[:, :, :3]}, "multiple of the number of key heads, got 3 and 2"),
        ({"q": Q.float()}, "share one dtype, got q torch.float32 and k torch.float64"),
        ({"q": Q.long(), "k": K.long(), "v": V.long()}, "floating-point"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"window_size": 4, "num_sinks": -1}, "num_sinks must not be negative, got -1"),
        ({"window_size": 4, "window_grid": 5}, "window_grid must lie between 1 and window_size=4, got 5"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "batch size must be 1, got 2"),
        ({"backend": "tourch"}, "Did you mean 'torch'"),
        ({"backend": "sdpa", "window_size": 3}, "does not cover this call"),
        ({"prefix": PAST._replace(num_seen=torch.tensor([4]))}, r"num_seen must be .* shape \(2,\)"),
        ({"prefix": PAST._replace(k=PAST.k[:1])}, r"prefix.k must have shape \(2, slots, 2, 5\)"),
        ({"prefix": PAST._replace(v=PAST.v[:, :3])}, "same number of slots, got 4 and 3"),
        ({"prefix": PAST._replace(k=PAST.k.float())}, "prefix.k must have the dtype of the call"),
        ({"prefix": PAST._replace(sink_k=PAST.k)}, "must be given together"),
        ({"prefix": PAST._replace(num_seen=torch.tensor([4, 7]))}, "needs the whole past .* 7 tokens read"),
        (
            {"prefix": PAST._replace(num_seen=torch.tensor([4, 7])), "window_size": 5, "num_sinks": 2},
            "carries 0 sink slots",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    given = {"q": Q, "k": K, "v": V, **arguments}
    with pytest.raises(ValueError, match=message):
        attention(**given)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 6], "must start with 0"),
        ([0, 4], "end with the number of tokens 6"),
        ([0, 4, 3, 6], "never decrease"),
        ([[0, 6]], "1-D integer tensor"),
        ([0.0, 6.0], "1-D integer tensor"),
    ],
)
def test_bad_boundaries_are_named(bounds: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(Q[:1], K[:1], V[:1], cu_seqlens=torch.tensor(bounds))
