"""The union softmax: every form against the definition, outputs, log-sum-exp and gradients."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import (
    KVPrefix,
    SlotStream,
    attention,
    available_backends,
    lagged_attention,
    merge_streams,
    select_eidetic,
    union_attention,
)
from memzoo.kernels.union_attention import chunked
from memzoo.testing import assert_close

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 5, 3
needs_triton = pytest.mark.skipif(
    "triton" not in available_backends("union_attention"), reason="Triton is made for Linux only"
)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def streams(num_tiles: int = 7, num_queries: int = 3) -> list[SlotStream]:
    """A pool with empty slots and runs of queries, and slots that every tile has for itself."""
    g = torch.Generator().manual_seed(0)
    pooled = SlotStream(
        draw(g, num_tiles, num_queries, HEADS, WIDTH),
        draw(g, 11, KV_HEADS, WIDTH),
        draw(g, 11, KV_HEADS, VALUE_WIDTH),
        torch.randint(-3, 11, (num_tiles, 6), generator=g),
        torch.randint(0, 3, (num_tiles, 6), generator=g),
        torch.randint(0, 3, (num_tiles, 6), generator=g),
    )
    own = SlotStream(
        draw(g, num_tiles, num_queries, HEADS, WIDTH),
        draw(g, num_tiles, 4, KV_HEADS, WIDTH),
        draw(g, num_tiles, 4, KV_HEADS, VALUE_WIDTH),
        first=torch.randint(0, 4, (num_tiles, 4), generator=g),
    )
    return [pooled, own]


def results(given: list[SlotStream], backend: str) -> dict[str, Tensor]:
    """Output, finite log-sum-exp, and the gradients of both."""
    leaves = [x for stream in given for x in (stream.q, stream.k, stream.v)]
    out = union_attention(given, backend=backend)
    lse = out.lse.masked_fill(out.lse == -torch.inf, 0)
    weight = torch.linspace(-1, 1, out.output.numel(), dtype=out.output.dtype).view_as(out.output)
    grads = torch.autograd.grad((out.output * weight).sum() + lse.sin().sum(), leaves)
    return {"output": out.output, "lse": lse, **{f"grad {i}": grad for i, grad in enumerate(grads)}}


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("limit", [None, 60])
def test_agrees_with_the_definition(num_streams: int, limit: int | None, monkeypatch) -> None:
    if limit is not None:  # several groups of tiles
        monkeypatch.setattr(chunked, "CPU_SCORES", limit)
    given = streams()[:num_streams]
    expected = results(given, "reference")
    for name, found in results(given, "torch").items():
        assert_close(name, found, expected[name], 1e-12)


def test_a_query_that_sees_nothing_reads_zeros() -> None:
    (stream,) = streams()[:1]
    blind = stream._replace(place=torch.full_like(stream.place, -1))
    for backend in ("reference", "torch"):
        out = union_attention([blind], backend=backend)
        assert bool((out.output == 0).all())
        assert bool((out.lse == -torch.inf).all())
    grads = torch.autograd.grad(union_attention([blind]).output.sum(), [blind.q, blind.k, blind.v])
    assert all(bool((grad == 0).all()) for grad in grads)


def test_streams_read_alone_and_merged_are_the_union() -> None:
    given = streams()
    union = union_attention(given)
    merged, weights = merge_streams([union_attention([stream]) for stream in given])
    assert_close("output", merged.output, union.output, 1e-12)
    seen = union.lse > -torch.inf
    assert_close("lse", merged.lse[seen], union.lse[seen], 1e-12)
    assert torch.equal(merged.lse == -torch.inf, ~seen)
    assert_close("weights", weights.sum(0), seen.to(weights.dtype), 1e-12)
    leaves = [x for stream in given for x in (stream.q, stream.k, stream.v)]
    for one, other in zip(
        torch.autograd.grad(merged.output.square().sum(), leaves),
        torch.autograd.grad(union.output.square().sum(), leaves),
        strict=True,
    ):
        assert_close("gradient", one, other, 1e-12)


def test_bfloat16_accumulates_in_float32() -> None:
    given = [SlotStream(*(x.detach().bfloat16() for x in stream[:3]), *stream[3:]) for stream in streams()]
    out = union_attention(given)
    assert out.output.dtype == torch.bfloat16
    assert out.lse.dtype == torch.float32


@pytest.mark.parametrize(("lag", "window_size"), [(0, 4), (3, 4), (5, 1)])
@pytest.mark.parametrize("seen", [(0, 0), (2, 2), (9, 9), (7, 1)])
def test_lagged_attention_is_a_window_further_back(lag: int, window_size: int, seen: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    num_tokens, slots = 6, lag + window_size + 1
    length = max(seen) + num_tokens
    # the last tokens of each row are those of the call
    q, k, v = (
        draw(g, 2, length, HEADS, WIDTH),
        draw(g, 2, length, KV_HEADS, WIDTH),
        draw(g, 2, length, KV_HEADS, 3),
    )
    past = [
        torch.nn.functional.pad(x, (0, 0, 0, 0, slots, 0))[:, -num_tokens - slots : -num_tokens]
        for x in (k, v)
    ]
    prefix = KVPrefix(*past, torch.tensor(seen))
    call = [x[:, -num_tokens:] for x in (q, k, v)]
    out = lagged_attention(*call, lag=lag, window_size=window_size, prefix=prefix)
    position = torch.arange(-num_tokens, 0)
    age = position[:, None] - torch.arange(-length, 0)
    for row in range(2):
        is_seen = (age >= lag) & (age < lag + window_size)
        is_seen &= torch.arange(-length, 0) >= -num_tokens - seen[row]
        logits = (
            torch.einsum("tgrd,sgd->grts", call[0][row].unflatten(1, (KV_HEADS, -1)), k[row]) * WIDTH**-0.5
        )
        logits = logits.masked_fill(~is_seen, -torch.inf)
        lse = logits.logsumexp(-1).flatten(0, 1).T
        expected = torch.einsum("grts,sge->tgre", logits.softmax(-1).nan_to_num(0), v[row]).flatten(1, 2)
        assert_close("output", out.output[row], expected, 1e-12)
        assert torch.equal(out.lse[row] == -torch.inf, lse == -torch.inf)
        finite = lse > -torch.inf
        assert_close("lse", out.lse[row][finite], lse[finite], 1e-12)


def test_lagged_attention_of_packed_sequences() -> None:
    g = torch.Generator().manual_seed(2)
    bounds = torch.tensor([0, 9, 9, 11, 18])
    q, k, v = (draw(g, 1, 18, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    packed = lagged_attention(q, k, v, lag=3, window_size=2, cu_seqlens=bounds)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = [x[:, start:end] for x in (q, k, v)]
        alone = lagged_attention(*part, lag=3, window_size=2)
        assert_close("output", packed.output[:, start:end], alone.output, 1e-12)
        assert torch.equal(packed.lse[:, start:end] == -torch.inf, alone.lse == -torch.inf)


def test_lagged_attention_without_a_lag_is_attention() -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (draw(g, 2, 9, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = lagged_attention(q, k, v, lag=0, window_size=4)
    expected = attention(q, k, v, window_size=4, return_stats=True)
    assert torch.equal(out.output, expected.output)
    assert torch.equal(out.lse, expected.lse)


def test_a_prefix_that_is_too_short_for_the_lag_is_refused() -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (draw(g, 1, 2, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    prefix = KVPrefix(k[:, :1], v[:, :1], torch.tensor([5]))
    with pytest.raises(ValueError, match="Carry 4 tokens"):
        lagged_attention(q, k, v, lag=3, window_size=2, prefix=prefix)


@pytest.mark.parametrize("capacity", [1, 3, 5, None])
def test_selection_in_steps_is_the_selection_of_all(capacity: int | None) -> None:
    g = torch.Generator().manual_seed(5)
    stored = torch.randint(0, 4, (2, 3), generator=g).double()  # ties are frequent
    stored[0, 1] = -torch.inf
    if capacity is not None:
        stored = stored[:, :capacity]
    offered = torch.randint(0, 4, (2, 6, 4), generator=g).double()
    offered[1, 2, 1:] = -torch.inf
    kept = select_eidetic(stored, offered, capacity)
    num_stored = stored.shape[1]
    for row in range(2):
        for chunk in range(6):
            ranks = [*stored[row].tolist(), *offered[row, : chunk + 1].flatten().tolist()]
            places = [place for place, rank in enumerate(ranks) if rank > float("-inf")]
            best = sorted(places, key=lambda place: (-ranks[place], place))[:capacity]
            found = [place for place in kept[row, chunk].tolist() if place >= 0]
            assert found == sorted(best)
    assert num_stored + 24 == kept.shape[2] or capacity == kept.shape[2]


def test_wrong_sizes_are_refused() -> None:
    pooled, own = streams()
    with pytest.raises(ValueError, match="at least one stream"):
        union_attention([])
    with pytest.raises(ValueError, match="queries of one shape"):
        union_attention([pooled, own._replace(q=own.q[:, :2])])
    with pytest.raises(ValueError, match="Give places"):
        union_attention([own._replace(k=own.k[:3], v=own.v[:3], first=None)])
    with pytest.raises(ValueError, match="place must have shape"):
        union_attention([pooled._replace(place=pooled.place[:2], first=None, last=None)])
    with pytest.raises(ValueError, match="agree in all but their width"):
        union_attention([pooled._replace(v=pooled.v[:4])])


@needs_triton
@pytest.mark.parametrize("num_queries", [1, 19])
def test_triton_agrees_with_the_definition(num_queries: int) -> None:
    given = [
        SlotStream(*(x.detach().float().requires_grad_() for x in stream[:3]), *stream[3:])
        for stream in streams(3, num_queries)
    ]
    expected = results(given, "reference")
    for name, found in results(given, "triton").items():
        assert_close(name, found, expected[name], 1e-5)


@needs_triton
def test_triton_reads_more_slots_than_a_block_and_nothing_where_there_is_nothing() -> None:
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((2, 3, 2, 5), (40, 1, 5), (40, 1, 3)))
    place = torch.arange(40).repeat(2, 1)
    stream = SlotStream(*(x.requires_grad_() for x in (q, k, v)), place)
    expected = results([stream], "reference")
    for name, found in results([stream], "triton").items():
        assert_close(name, found, expected[name], 1e-5)
    blind = union_attention([stream._replace(place=torch.full_like(place, -1))], backend="triton")
    assert bool((blind.output == 0).all())
    assert bool((blind.lse == -torch.inf).all())
