"""Feature maps against stored outputs of the public code (linear_attention.md, `fm.*`; conversion.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.layers.parts.feature_maps import make_feature_map

DATA = np.load(Path(__file__).parent / "linear_attention_a.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[f"fm.{name}"])


@pytest.mark.parametrize(
    ("name", "array", "options"),
    [
        ("taylor", "taylor", {}),
        ("taylor_compact", "taylor_compact", {}),
        ("elu1", "elu1", {}),
        ("dpfp", "dpfp_paper", {"nu": 2}),
    ],
)
def test_maps_without_weights(name: str, array: str, options: dict) -> None:
    feature_map = make_feature_map(name, 4, **options)
    features = feature_map(golden("x"))
    assert features.shape[-1] == feature_map.out_dim
    torch.testing.assert_close(features, golden(array), rtol=0, atol=1e-13)


def test_hedgehog_with_weights() -> None:
    feature_map = make_feature_map("hedgehog", 4).double()
    feature_map.proj.weight.data = golden("hedgehog_fla.W")
    feature_map.proj.bias.data = golden("hedgehog_fla.b")
    torch.testing.assert_close(feature_map(golden("x")), golden("hedgehog_fla"), rtol=0, atol=1e-13)


def test_rebased_with_weights() -> None:
    feature_map = make_feature_map("rebased", 4).double()
    feature_map.gamma.data = golden("rebased.gamma")
    feature_map.beta.data = golden("rebased.beta")
    torch.testing.assert_close(feature_map(golden("x")), golden("rebased"), rtol=0, atol=1e-13)


def test_hedgehog_of_lolcats() -> None:
    data = np.load(Path(__file__).parent / "conversion_a.npz")
    for side, heads in (("q", 4), ("k", 2)):  # two key heads are mapped by four heads of weights
        feature_map = make_feature_map("hedgehog_lolcats", 8, num_heads=4, feature_dim=4).double()
        feature_map.weight.data = torch.from_numpy(data[f"lolcats.W_{side}"])
        x = torch.from_numpy(data[f"lolcats.{side}"]).transpose(1, 2)  # (B, T, H, D)
        assert x.shape[2] == heads
        expected = torch.from_numpy(data[f"lolcats.phi_{side}"]).transpose(1, 2)
        torch.testing.assert_close(feature_map(x), expected, rtol=0, atol=1e-13)
