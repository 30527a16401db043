"""Functions of single tokens in pieces: the numbers and gradients of the function itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memzoo.kernels.pieces import in_pieces, piece_size


def scaled_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) * torch.nn.functional.silu(gate.to(wide))
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight.to(wide)).to(x.dtype)


def inputs(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = [(2, num_tokens, 1024), (2, num_tokens, 1024), (1024,)]
    return [torch.randn(shape, generator=made, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("num_tokens", [0, 1, 32, 33, 101])
def test_pieces_change_neither_numbers_nor_gradients(num_tokens: int) -> None:
    x, gate, weight = inputs(num_tokens)
    assert piece_size(x) == 32  # so that 33 and 101 tokens are more than one piece, the last one shorter
    expected, got = scaled_norm(x, gate, weight), in_pieces(scaled_norm, (x, gate), (weight,))
    assert torch.equal(got, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, gate, weight), upstream)
    found = torch.autograd.grad(got, (x, gate, weight), upstream)
    for name, a, b in zip(("x", "gate", "weight"), wanted, found, strict=True):
        torch.testing.assert_close(
            b, a, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_made_only_where_they_are_wanted() -> None:
    x, gate, weight = inputs(100)
    out = in_pieces(scaled_norm, (x.detach(), gate), (weight.detach(),))
    (found,) = torch.autograd.grad(out.sum(), gate)
    (wanted,) = torch.autograd.grad(scaled_norm(x, gate, weight).sum(), gate)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_gradient_summed_over_pieces_is_wide() -> None:
    x, gate, weight = inputs(400, torch.bfloat16)
    (found,) = torch.autograd.grad(in_pieces(scaled_norm, (x, gate), (weight,)).sum(), weight)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, gate, weight)]
    (wanted,) = torch.autograd.grad(scaled_norm(*wide).sum(), wide[2])
    assert found.dtype == torch.bfloat16
    # one rounding at the end, none per piece
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2**-6)


def test_only_inputs_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    x, gate, weight = inputs(200)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        in_pieces(scaled_norm, (x, gate), (weight,))
    assert sum(kept) == x.numel() + gate.numel() + weight.numel()
