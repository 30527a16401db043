"""Scores that differ by rounding alone are equal, and the lower position wins."""

import pytest
import torch

from memzoo.layers.policies.selection import settled


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 40), (torch.float32, 16)])
def test_rounding_decides_nothing_and_values_stay(dtype: torch.dtype, bits: int) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=made, dtype=torch.float64).exp().to(dtype)
    noisy = x * (1 + torch.finfo(dtype).eps * torch.randn(1000, generator=made, dtype=torch.float64)).to(
        dtype
    )
    kept = settled(x)
    assert ((kept - x).abs() <= x.abs() * 2.0**-bits).all()
    # only those that lie on the border of two steps may still differ
    assert (settled(noisy) != kept).sum() <= 20
    assert (noisy != x).sum() > 300
    assert (kept[1:] - kept[:-1] != 0).float().mean() > 0.99


def test_forced_and_empty_slots_stay_so() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 0.0, -3.0])
    assert torch.equal(settled(x), x)
