"""BaseConv: the written-out convolution, its tail, and refused configurations."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import build_mixer


def tokens(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(2, num_tokens, 6, generator=generator, dtype=torch.float64)


def convolve(u: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum_i taps_i u_{t - k + 1 + i} by a loop."""
    padded = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
    return sum(taps[:, i] * padded[:, i : i + u.shape[1]] for i in range(taps.shape[1]))


@pytest.mark.parametrize("conv_size", [1, 2, 5])
def test_gated_variant_is_its_formula(conv_size: int) -> None:
    mixer = build_mixer({"type": "base_conv", "d_model": 6, "conv_size": conv_size, "expand": 2}).double()
    x = tokens(7)
    u, gate = mixer.in_proj(x).chunk(2, dim=-1)
    expected = mixer.out_proj(F.silu(convolve(u, mixer.conv_weight)) * gate)
    torch.testing.assert_close(mixer(x).hidden, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("conv_size", [1, 3])
def test_zoology_variant_is_its_formula(conv_size: int) -> None:
    config = {"type": "base_conv", "d_model": 6, "conv_size": conv_size, "variant": "zoology"}
    mixer = build_mixer(config).double()
    mixer.conv_bias.data.normal_(generator=torch.Generator().manual_seed(0))
    x = tokens(7)
    expected = (convolve(x, mixer.conv_weight) + mixer.conv_bias) * mixer.in_proj(x) + x
    torch.testing.assert_close(mixer(x).hidden, expected, rtol=0, atol=1e-13)


def test_tail_keeps_older_inputs_when_few_tokens_come() -> None:
    mixer = build_mixer({"type": "base_conv", "d_model": 6, "conv_size": 5, "variant": "zoology"}).double()
    x = tokens(6)
    state = None
    for t in range(6):
        state = mixer(x[:, t : t + 1], state, return_state=True).state
        kept = min(t + 1, 4)
        torch.testing.assert_close(state.tail[:, 4 - kept :], x[:, t + 1 - kept : t + 1], rtol=0, atol=0)
        assert not bool(state.tail[:, : 4 - kept].any())


def test_tail_keeps_the_dtype_of_the_activations() -> None:
    mixer = build_mixer({"type": "base_conv", "d_model": 6}).to(torch.bfloat16)
    out = mixer(tokens(5).to(torch.bfloat16), return_state=True)
    assert out.hidden.dtype == out.state.tail.dtype == torch.bfloat16
    assert mixer.state_num_bytes(5, 2, torch.bfloat16) == out.state.num_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "gate"}, "Did you mean 'gated'"),
        ({"conv_size": 0}, "conv_size must be an integer of at least 1"),
        ({"d_model": 5, "expand": 3}, "expand \\* d_model must be even, got 3 \\* 5"),
    ],
)
def test_refused_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "base_conv", "d_model": 6, **config})
