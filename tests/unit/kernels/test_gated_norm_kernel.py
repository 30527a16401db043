"""Gated RMS normalisation: the closed gradient against the definition's, piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.kernels import gated_rms_norm
from memzoo.kernels.pieces import piece_size
from memzoo.testing import assert_close

NAMES = ("y", "z", "weight", "u", "factor")
VARIANTS = [
    {"num_groups": groups, "activation": activation, "norm_before_gate": first}
    for groups in (1, 4)
    for activation in ("silu", "sigmoid")
    for first in (False, True)
]


def inputs(num_tokens: int, width: int = 1024, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = [(2, num_tokens, width)] * 2 + [(width,), (2, num_tokens, width), (width,)]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def call(tensors: list[Tensor], **options: Any) -> Tensor:
    y, z, weight, *skip = tensors
    return gated_rms_norm(y, z, weight, skip=tuple(skip) if skip else None, **options)


def compare(tensors: list[Tensor], bound: float, **options: Any) -> None:
    expected, got = (call(tensors, backend=backend, **options) for backend in ("reference", "torch"))
    assert got.dtype == expected.dtype == tensors[1].dtype
    assert_close("output", got, expected, bound)
    upstream = torch.randn_like(expected)
    wanted, found = (torch.autograd.grad(out, tensors, upstream) for out in (expected, got))
    for name, a, b in zip(NAMES, found, wanted, strict=False):
        assert a.dtype == b.dtype
        assert_close(f"gradient of {name}", a, b, bound)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("has_skip", [False, True])
def test_every_form_equals_the_definition(options: dict[str, Any], has_skip: bool) -> None:
    tensors = inputs(3, 12)
    compare(tensors if has_skip else tensors[:3], 1e-12, **options)
    narrow = inputs(3, 12, torch.float32)
    compare(narrow if has_skip else narrow[:3], 1e-6, **options)


@pytest.mark.parametrize("num_tokens", [0, 1, 128, 129, 300])
def test_pieces_change_nothing(num_tokens: int) -> None:
    tensors = inputs(num_tokens)
    assert piece_size(tensors[0]) == 128  # so that 129 and 300 tokens are more than one piece
    compare(tensors, 1e-12)


def test_a_gate_between_other_channels_and_a_transposed_input_are_read_in_place() -> None:
    y, z, weight, u, factor = inputs(5, 12)
    wide = torch.cat([z, z, z], -1)[..., 12:24]
    turned = y.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close("output", call([turned, wide, weight, u, factor]), call([y, z, weight, u, factor]), 1e-14)


def test_gradients_are_made_only_where_they_are_wanted() -> None:
    y, z, weight, *_ = inputs(7, 12)
    (found,) = torch.autograd.grad(gated_rms_norm(y.detach(), z, weight.detach()).sum(), z)
    (wanted,) = torch.autograd.grad(gated_rms_norm(y, z, weight, backend="reference").sum(), z)
    assert_close("gradient", found, wanted, 1e-12)


def test_a_gradient_summed_over_tokens_is_wide() -> None:
    tensors = inputs(400, dtype=torch.bfloat16)
    found = torch.autograd.grad(call(tensors).sum(), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    wanted = torch.autograd.grad(call(wide).sum(), wide)
    for n in (2, 4):
        assert found[n].dtype == torch.bfloat16
        # one rounding at the end, none per piece
        torch.testing.assert_close(found[n].double(), wanted[n], rtol=2**-8, atol=2**-6)


def test_only_inputs_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    tensors = inputs(200)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(tensors)
    assert sum(kept) == sum(x.numel() for x in tensors)


def test_a_gradient_checked_by_differences() -> None:
    for options in VARIANTS:
        assert torch.autograd.gradcheck(lambda *x, o=options: call(list(x), **o), inputs(2, 8))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -1e4])
def test_zeros_and_extremes_stay_finite(value: float) -> None:
    for options in VARIANTS:
        tensors = [torch.full_like(x, value, dtype=torch.float32) for x in inputs(2, 12)[:2]]
        weight = torch.ones(12)
        for x in (*tensors, weight):
            x.requires_grad_()
        out = gated_rms_norm(*tensors, weight, **options)
        expected = gated_rms_norm(*tensors, weight, backend="reference", **options)
        assert torch.equal(out.isfinite(), expected.isfinite())
        if abs(value) < 1e19:  # a square that float32 cannot hold is outside of what either form can do
            assert out.isfinite().all()
            assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (*tensors, weight)))


def test_autocast_does_not_round_the_sums() -> None:
    tensors = inputs(3, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(tensors)
    assert torch.equal(got, call(tensors))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z": torch.zeros(1, 2, 5)}, "z must have the shape of y"),
        ({"weight": torch.ones(4)}, r"weight must have shape \(6,\)"),
        ({"num_groups": 4}, "num_groups must divide the 6 channels, got 4"),
        ({"num_groups": 0}, "num_groups must divide the 6 channels, got 0"),
        ({"activation": "relu"}, "activation must be one of silu, sigmoid, got 'relu'"),
        ({"skip": (torch.zeros(1, 2, 6), torch.zeros(5))}, "skip must be tensors"),
        ({"y": torch.zeros(2, 6)}, "y must"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    given = {"y": torch.zeros(1, 2, 6), "z": torch.zeros(1, 2, 6), "weight": torch.ones(6)}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{**given, **changed})
