"""State-space layers against stored numbers of the public references (ssm.md beside this file)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import selective_scan

DATA = np.load(Path(__file__).parent / "ssm_a.npz")


def load(case: str) -> dict[str, Tensor]:
    """All arrays of a case, without its name in front."""
    return {
        name.removeprefix(f"{case}."): torch.from_numpy(DATA[name])
        for name in DATA.files
        if name.startswith(f"{case}.") and DATA[name].dtype.kind in "fib"
    }


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    """The bound of the .md: 2e-5 max(1, |ref|) in float32, 1e-10 in float64."""
    bound = 1e-10 if expected.dtype == torch.float64 else 2e-5
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.detach().max()) <= bound, f"{name}: {float(error.detach().max()):.3g}"


def test_every_array_is_known() -> None:
    """Guards the loops over names in here."""
    assert {name.split(".")[0] for name in DATA.files} >= {"s6", "s6_plain", "s6_grouped", "ssd", "m1", "m2"}


def channels_last(name: str, x: Tensor) -> Tensor:
    """The layout of the file to ours."""
    if name in ("u", "delta", "z", "out", "grad_out"):
        return x.transpose(1, 2)
    if name in ("B", "C"):
        x = x[:, None] if x.dim() == 3 else x  # (B, G, N, T)
        return x.permute(0, 3, 1, 2)
    return x


@pytest.mark.parametrize(
    "backend, chunk_size", [("reference", None), ("torch", 1), ("torch", 4), ("torch", None)]
)
@pytest.mark.parametrize("case", ["s6", "s6_plain", "s6_grouped"])
def test_selective_scan(case: str, backend: str, chunk_size: int | None) -> None:
    arrays = load(case)
    names = [n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if n in arrays]
    inputs = {n: channels_last(n, arrays[n]).clone().requires_grad_() for n in names}
    assert set(names) >= {"u", "delta", "A", "B", "C", "delta_bias"}
    given = {("x" if n == "u" else n): x for n, x in inputs.items()}
    y, state = selective_scan(
        **given, delta_softplus=True, return_state=True, backend=backend, chunk_size=chunk_size
    )
    assert_near("out", y, channels_last("out", arrays["out"]))
    assert_near("last_state", state, arrays["last_state"])
    grads = torch.autograd.grad((y * channels_last("out", arrays["grad_out"])).sum(), list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        assert_near(f"d_{name}", grad, channels_last(name, arrays[f"d_{name}"]))
