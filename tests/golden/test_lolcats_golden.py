"""The LoLCATs layer against stored outputs of the paper's code (conversion.md: lolcats.*; float64, 1e-9)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.kernels import linear_attention
from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.feature_maps import make_feature_map

DATA = np.load(Path(__file__).parent / "conversion_a.npz")
HEADS, KV_HEADS, WIDTH = 4, 2, 8
WINDOWS = {"sw": "sliding", "tk": "terrace"}


def golden(name: str) -> Tensor:
    return torch.from_numpy(DATA[f"lolcats.{name}"])


def by_time(name: str) -> Tensor:
    """(B, H, T, D) of the file -> (B, T, H, D)."""
    return golden(name).transpose(1, 2)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def lolcats(window: str, **options: object) -> TokenMixer:
    """A layer whose projections pick q, k and v of the file out of the input."""
    mixer = build_mixer(
        {
            "type": "lolcats",
            "d_model": (HEADS + 2 * KV_HEADS) * WIDTH,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": WIDTH,
            "rope_theta": None,
            "window_size": int(golden("window_size")),
            "window": window,
            "feature_dim": 4,
            "chunk_size": 5,
            **options,
        }
    ).double()
    rows = torch.eye((HEADS + 2 * KV_HEADS) * WIDTH, dtype=torch.float64).split(
        [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    )
    for linear, weight in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), rows, strict=True):
        linear.weight.data = weight.clone()
    mixer.q_map.weight.data = golden("W_q").clone()
    mixer.k_map.weight.data = golden("W_k").clone()
    mixer.window_factor.data = golden("window_factor").flatten().clone()
    return mixer


def tokens() -> Tensor:
    return torch.cat([by_time(name).flatten(-2) for name in ("q", "k", "v")], dim=-1)


def head_outputs(mixer: TokenMixer) -> Tensor:
    return mixer(tokens(), return_extras=True).extras["head_outputs"]


@pytest.mark.parametrize("name", ["sw", "tk", "sw_affine", "tk_affine"])
def test_outputs(name: str) -> None:
    mixer = lolcats(WINDOWS[name[:2]], is_affine=name.endswith("affine"))
    assert_close(head_outputs(mixer), by_time(f"{name}.y"))


@pytest.mark.parametrize("name", ["sw", "tk"])
def test_loss_and_gradients_of_attention_transfer(name: str) -> None:
    mixer = lolcats(WINDOWS[name])
    loss = 1000 * F.mse_loss(head_outputs(mixer), by_time("teacher_y"))
    assert_close(loss, golden(f"{name}.loss_mse_x1000"))
    loss.backward()
    assert_close(mixer.q_map.weight.grad, golden(f"{name}.grad_W_q"))
    assert_close(mixer.k_map.weight.grad, golden(f"{name}.grad_W_k"))
    assert_close(mixer.window_factor.grad, golden(f"{name}.grad_window_factor").flatten())


@pytest.mark.parametrize("name", ["sw", "tk"])
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 11, 15])
def test_outputs_when_read_in_two_pieces(name: str, cut: int) -> None:
    mixer, x = lolcats(WINDOWS[name]), tokens()
    first = mixer(x[:, :cut], return_state=True, return_extras=True)
    second = mixer(x[:, cut:], first.state, return_extras=True)
    outputs = torch.cat([first.extras["head_outputs"], second.extras["head_outputs"]], dim=1)
    assert_close(outputs, by_time(f"{name}.y"))


def test_teacher_is_the_layer_whose_window_holds_everything() -> None:
    assert_close(head_outputs(lolcats("sliding", window_size=16)), by_time("teacher_y"))
    assert_close(head_outputs(lolcats("terrace", window_size=8)), by_time("teacher_y"))


def test_linear_part_alone() -> None:
    features = []
    for side in ("q", "k"):
        feature_map = make_feature_map("hedgehog_lolcats", WIDTH, num_heads=HEADS, feature_dim=4).double()
        feature_map.weight.data = golden(f"W_{side}")
        features.append(feature_map(by_time(side)))
    v = by_time("v").repeat_interleave(HEADS // KV_HEADS, dim=2)
    out, _ = linear_attention(*features, v, normalize=True, scale=1.0, eps=1e-12, chunk_size=5)
    assert_close(out, by_time("linear_only.y"))
