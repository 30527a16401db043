"""Feature maps: algebra, options, numerics."""

import math

import pytest
import torch

from memzoo.layers.parts.feature_maps import list_feature_maps, make_feature_map


def build(name: str, head_dim: int):
    return make_feature_map(name, head_dim, num_heads=3 if name == "hedgehog_lolcats" else None)


def heads(head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 4, 3, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("head_dim", [1, 5, 8])
@pytest.mark.parametrize("name", ["taylor", "taylor_compact"])
def test_taylor_features_give_the_second_order_expansion(name: str, head_dim: int) -> None:
    feature_map = make_feature_map(name, head_dim)
    x = heads(head_dim)
    q, k = x[0], x[1]
    u = (q * k).sum(-1) / math.sqrt(head_dim)
    product = (feature_map(q) * feature_map(k)).sum(-1)
    torch.testing.assert_close(product, 1 + u + u**2 / 2, rtol=0, atol=1e-12)
    assert feature_map.scale == 1.0


def test_rebased_is_a_squared_product_of_normalised_heads() -> None:
    feature_map = build("rebased", 6)
    x = heads(6)
    y = torch.nn.functional.layer_norm(x, (6,))
    product = (feature_map(x[0]) * feature_map(x[1])).sum(-1)
    torch.testing.assert_close(product, (y[0] * y[1]).sum(-1) ** 2 / 6, rtol=0, atol=1e-9)


def test_elu_stays_positive_and_smooth() -> None:
    feature_map = make_feature_map("elu1", 1)
    x = torch.tensor([-40.0, -20.0, -1.0, 0.0, 1.0]).view(1, 5, 1, 1).requires_grad_()
    features = feature_map(x)
    assert float(features.detach().min()) > 0
    features.sum().backward()
    expected = x.detach().clamp(max=0).exp()  # the derivative of elu
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


def test_joint_and_separate_hedgehog_differ_in_their_sums() -> None:
    x = heads(5)
    joint = build("hedgehog", 5).double()(x).sum(-1)
    separate = build("hedgehog_lolcats", 5).double()(x).sum(-1)
    torch.testing.assert_close(joint, torch.ones_like(joint))
    torch.testing.assert_close(separate, torch.full_like(separate, 2.0))


@pytest.mark.parametrize("name", list_feature_maps())
def test_width_dtype_and_finite_gradients(name: str) -> None:
    feature_map = build(name, 5)
    for dtype in (torch.float32, torch.bfloat16):
        x = heads(5, dtype).requires_grad_()
        features = feature_map(x)
        assert features.shape == (2, 4, 3, feature_map.out_dim)
        assert features.dtype == dtype
        features.float().square().sum().backward()
        assert torch.isfinite(x.grad).all()
    with torch.no_grad():
        for value in (0.0, 1e4, -1e4, 1e-30):
            assert torch.isfinite(feature_map(torch.full((1, 1, 3, 5), value))).all()


@pytest.mark.parametrize("name", [n for n in list_feature_maps() if build(n, 5).is_positive])
def test_positive_maps_never_give_a_negative_weight(name: str) -> None:
    feature_map = build(name, 5).double()
    x = 3 * heads(5)
    weights = torch.einsum("bthk,bshk->bhts", feature_map(x), feature_map(x.flip(1)))
    assert float(weights.detach().min()) >= -1e-12


@pytest.mark.parametrize("name", ["identity", "hadamard"])
def test_maps_that_may_give_negative_weights_say_so(name: str) -> None:
    assert not build(name, 5).is_positive


def test_grouped_heads_equal_repeated_heads() -> None:
    feature_map = make_feature_map("hedgehog_lolcats", 6, num_heads=6, feature_dim=4).double()
    x = heads(6)[:, :, :2]
    torch.testing.assert_close(feature_map(x), feature_map(x.repeat_interleave(3, dim=2)), rtol=0, atol=1e-14)


def test_features_under_autocast_are_computed_in_float32() -> None:
    feature_map = build("hedgehog", 5)
    x = heads(5, torch.float32)
    expected = feature_map(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_map(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tailor", "head_dim": 4}, "Did you mean 'taylor'"),
        ({"name": "elu1", "head_dim": 4, "nu": 2}, "no option 'nu'"),
        ({"name": "dpfp", "head_dim": 4, "nu": 8}, "nu must lie between 1 and 7"),
        ({"name": "dpfp", "head_dim": 4, "feature_dim": 8}, "no option 'feature_dim'"),
        ({"name": "hedgehog_lolcats", "head_dim": 4}, "needs num_heads"),
        ({"name": "t2r", "head_dim": 0}, "head_dim"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_feature_map(**arguments)


def test_heads_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="made for heads of width 4"):
        make_feature_map("elu1", 4)(torch.zeros(1, 1, 1, 5))
