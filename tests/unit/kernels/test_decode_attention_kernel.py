"""One query against a cache of slots in any order."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import attention, decode_attention
from memzoo.testing import assert_close


def tensors(rows: int, slots: int, num_kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * rows + slots)
    return [
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((rows, 1, 6, 5), (rows, slots, num_kv_heads, 5), (rows, slots, num_kv_heads, 3))
    ]


def some_valid(rows: int, slots: int) -> Tensor:
    valid = torch.rand(rows, slots, generator=torch.Generator().manual_seed(slots)) > 0.4
    valid[:, slots // 2] = True
    return valid


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("slots", [1, 7, 130])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(rows: int, slots: int, num_kv_heads: int, masked: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        inputs = tensors(rows, slots, num_kv_heads, dtype)
        valid = some_valid(rows, slots) if masked else None
        results = []
        for name in ("torch", "reference"):
            out = decode_attention(*inputs, valid=valid, return_stats=True, backend=name)
            total = out.output.square().sum() + out.lse.sum() + 2 * out.row_max.sum()
            results.append([*out, *torch.autograd.grad(total, inputs)])
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert_close(f"tensor {i}", actual, expected, bound)


@pytest.mark.parametrize("num_kv_heads", [1, 6])
def test_a_bias_is_added_to_the_logits(num_kv_heads: int) -> None:
    q, k, v = tensors(2, 7, num_kv_heads)
    bias = torch.randn(
        2, 7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).requires_grad_()
    each = [x.repeat_interleave(6 // num_kv_heads, dim=2) for x in (k, v)]
    logits = torch.einsum("nthd,nshd->nhs", q, each[0]) * 5**-0.5 + bias.transpose(1, 2)
    expected = torch.einsum("nhs,nshe->nhe", logits.softmax(-1), each[1])[:, None]
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v, bias))
    for name in ("torch", "reference"):
        out = decode_attention(q, k, v, bias=bias, backend=name).output
        assert_close("output", out, expected, 1e-12)
        for actual, grad in zip(
            torch.autograd.grad(out.square().sum(), (q, k, v, bias)), wanted, strict=True
        ):
            assert_close("gradient", actual, grad, 1e-12)


def test_equals_the_last_row_of_attention() -> None:
    _, k, v = tensors(2, 9, 2)
    q = torch.randn(2, 9, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    whole = attention(q, k, v, return_stats=True)
    last = decode_attention(q[:, -1:], k[:, order], v[:, order], return_stats=True)
    for actual, expected in zip(last, whole, strict=True):
        assert_close("last row", actual, expected[:, -1:], 1e-12)


@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_bfloat16_errs_no_more_than_twice_the_plain_form(num_kv_heads: int) -> None:
    q, k, v = (x.detach().bfloat16() for x in tensors(3, 130, num_kv_heads))
    exact = decode_attention(q.double(), k.double(), v.double()).output
    k_each, v_each = (x.repeat_interleave(6 // num_kv_heads, dim=2).transpose(1, 2) for x in (k, v))
    logits = torch.matmul(q.transpose(1, 2), k_each.transpose(2, 3)) * 5**-0.5
    plain = torch.matmul(logits.softmax(-1), v_each).transpose(1, 2)
    ours = decode_attention(q, k, v).output
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - exact).abs().max()) <= 2 * float((plain.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_invalid_slots_are_never_read(dtype: torch.dtype) -> None:
    q, k, v = tensors(3, 12, 2, dtype)
    valid = some_valid(3, 12)
    results = []
    for poison in (0.0, float("nan")):
        inputs = [
            q,
            *(x.detach().masked_fill(~valid[:, :, None, None], poison).requires_grad_() for x in (k, v)),
        ]
        out = decode_attention(*inputs, valid=valid, return_stats=True)
        results.append([*out, *torch.autograd.grad(sum(x.float().sum() for x in out), inputs)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert not results[1][4][~valid].any()
    assert not results[1][5][~valid].any()


Q, K, V = (x.detach() for x in tensors(2, 4, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q.expand(2, 3, 6, 5)}, r"q must be \(N, 1, H, D\)"),
        ({"q": Q[:1]}, r"q must be \(N, 1, H, D\) with the N of k"),
        ({"k": K[:, :0], "v": V[:, :0]}, "at least one slot"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"bool tensor of shape \(2, 4\)"),
        ({"valid": torch.ones(2, 4)}, "valid must be a bool tensor"),
        ({"bias": torch.zeros(2, 4, 2)}, r"bias must be torch.float64 of shape \(2, 4, 6\)"),
        ({"q": Q[:, :, :5]}, "multiple of the number of key heads, got 5 and 2"),
        ({"backend": "flash_attn"}, "is not a backend of decode_attention"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(**{"q": Q, "k": K, "v": V, **arguments})
