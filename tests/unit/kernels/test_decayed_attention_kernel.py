"""Attention whose keys fade: definition, tiles, prefixes, packed rows, gradients, extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memzoo.kernels import DecayPrefix, attention, decayed_attention
from memzoo.kernels.decayed_attention import chunked
from memzoo.testing import assert_close

FORMS = pytest.mark.parametrize("form", ["age", "sum"])
H, HKV, D, E = 4, 2, 6, 5


def draw(form: str, rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and log-decays, a few of them strong."""
    generator = torch.Generator().manual_seed(tokens + 7 * rows)
    shapes = ((H, D), (HKV, D), (HKV, E), (H if form == "sum" else HKV,))
    made = [torch.randn(rows, tokens, *s, generator=generator, dtype=torch.float64) for s in shapes]
    made[3] = -0.2 * made[3].abs()
    made[3][:, 3::17] = -20
    return [x.to(dtype).requires_grad_() for x in made]


def results(
    inputs: list[Tensor], backend: str, seen: Tensor | None = None, **options: object
) -> list[Tensor]:
    """The output and all gradients; inputs behind the fourth are those of a prefix."""
    prefix = None if seen is None else DecayPrefix(*inputs[4:], seen)
    out = decayed_attention(*inputs[:4], prefix=prefix, backend=backend, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)]


@pytest.fixture(params=[(7, 400), (256, 1 << 20)], ids=["small tiles", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "tile_limits", lambda window_size, on_cpu: request.param)


@FORMS
@pytest.mark.parametrize("lengths", [None, (13, 0, 1, 20)], ids=["dense", "packed"])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_tiles_agree_with_the_definition(
    tiles: None, form: str, lengths: tuple[int, ...] | None, carried: bool
) -> None:
    rows, tokens = (2, 33) if lengths is None else (1, sum(lengths))
    num = rows if lengths is None else len(lengths)
    inputs, seen = draw(form, rows, tokens), None
    if carried:
        past = [x.detach().clone() for x in draw(form, num, 9)[1:]]
        seen = torch.tensor([9, 4, 0, 6][:num])
        for x in past:
            for n in range(num):
                x[n, : 9 - int(seen[n])] = float("nan")  # never read
        inputs = inputs + [x.requires_grad_() for x in past]
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    expected = results(inputs, "reference", seen, form=form, cu_seqlens=bounds)
    found = results(inputs, "torch", seen, form=form, cu_seqlens=bounds)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close("tiles", actual, wanted, 1e-9)


@FORMS
def test_float32_keeps_its_digits_behind_strong_decays(form: str) -> None:
    inputs = draw(form, 1, 90)
    expected = results(inputs, "reference", form=form)
    found = results([x.detach().float().requires_grad_() for x in inputs], "torch", form=form)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close("float32", actual, wanted, 1e-4)


@FORMS
def test_without_decay_it_is_attention(form: str) -> None:
    q, k, v, g = draw(form, 2, 40)
    still = torch.zeros_like(g)
    assert_close(
        "output",
        decayed_attention(q, k, v, still, form=form),
        attention(q, k, v, backend="torch").output,
        1e-12,
    )


@FORMS
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_is_gone_leaves_the_token_alone(form: str, backend: str) -> None:
    q, k, v, g = draw(form, 1, 12, torch.float32)
    gone = torch.full_like(g, float("-inf")).requires_grad_()
    out = decayed_attention(q, k, v, gone, form=form, backend=backend)
    assert torch.equal(out, v.repeat_interleave(H // HKV, 2))
    for grad in torch.autograd.grad(out.sum(), (q, k, v, gone)):
        assert torch.isfinite(grad).all()


@FORMS
def test_causal_to_the_bit(form: str) -> None:
    q, k, v, g = (x.detach() for x in draw(form, 1, 300, torch.float32))
    changed = [x.clone() for x in (q, k, v, g)]
    for x in changed:
        x[:, 270:] = -1
    first, second = (decayed_attention(*x, form=form)[:, :270] for x in ((q, k, v, g), changed))
    assert torch.equal(first, second)


@FORMS
def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    inputs = draw(form, 2, 20)
    expected = results(inputs, "torch", form=form)
    monkeypatch.setattr(chunked, "is_compiling", lambda: True)
    for actual, wanted in zip(results(inputs, "torch", form=form), expected, strict=True):
        assert torch.equal(actual, wanted)
    groups = 2 if form == "sum" else 1
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2, 6, 5), (4, 6, 5), (4, 6, 3), (4, groups, 6))
    tensors = [torch.rand(*s, generator=generator).requires_grad_() for s in shapes]
    tile = [0, 4, 0, 6, 0, 0, 0, 6, 0, 0]
    torch.library.opcheck(torch.ops.memzoo.decayed_attention.default, (*tensors, tile, 0.5, form))


def test_scaled_form_never_forgets() -> None:
    """The published eager code: a logit of 0 is not a weight of 0."""
    q, k, v, g = draw("age", 1, 12)
    out = decayed_attention(q, k, v, torch.full_like(g, float("-inf")), form="scaled")
    own = torch.einsum("bthd,bthd->bth", q, k.repeat_interleave(2, 2))[0, 2] * D**-0.5
    share = own.exp() / (own.exp() + 2)  # of the third token, beside two of weight 1
    mean = v[0, :2].mean(0).repeat_interleave(2, 0)
    expected = share[:, None] * v[0, 2].repeat_interleave(2, 0) + (1 - share)[:, None] * mean
    assert_close("third token", out[0, 2], expected, 1e-10)
    with pytest.raises(ValueError, match="does not cover this call"):
        decayed_attention(q, k, v, g, form="scaled", backend="torch")


Q, K, V, G = (x.detach() for x in draw("age", 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "ages"}, "form must be one of age, sum, scaled"),
        ({"form": "sum"}, r"log_decay must be torch.float64 of shape \(2, 4, 4\)"),
        ({"log_decay": G.float()}, "log_decay must be torch.float64"),
        ({"k": K[:, :3]}, "must agree in batch and tokens"),
        ({"q": Q[:, :, :3]}, "multiple of the number of key heads, got 3 and 2"),
        (
            {"prefix": DecayPrefix(K, V, G[:, :3], torch.tensor([4, 4]))},
            r"prefix.log_decay must be .* \(2, 4, 2\)",
        ),
        ({"prefix": DecayPrefix(K, V, G, torch.tensor([4, 5]))}, "must hold the whole past: 4 slots"),
        ({"prefix": DecayPrefix(K, V, G, torch.tensor([4.0, 4]))}, "num_seen must be an int64"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decayed_attention(**{"q": Q, "k": K, "v": V, "log_decay": G, **arguments})
