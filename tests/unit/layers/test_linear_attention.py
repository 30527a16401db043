"""Linear attention and BASED: the written-out sum over earlier tokens, sizes, refused configurations."""

import math

import pytest
import torch
from torch import Tensor

from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.feature_maps import make_feature_map


def build(**config: object) -> TokenMixer:
    torch.manual_seed(0)
    mixer = build_mixer({"type": "linear_attention", "d_model": 12, **config}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return mixer


def tokens(num_tokens: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, num_tokens, 12, generator=generator, dtype=torch.float64)


def written_out(mixer: TokenMixer, x: Tensor) -> Tensor:
    """Weights of every pair of tokens by the formula of the module docstring."""
    c = mixer.config
    groups = c.num_heads // c.kv_heads
    q = mixer.q_map(mixer.q_proj(x).unflatten(-1, (c.num_heads, -1)))
    k = mixer.k_map(mixer.k_proj(x).unflatten(-1, (c.kv_heads, -1))).repeat_interleave(groups, dim=2)
    v = mixer.v_proj(x).unflatten(-1, (c.kv_heads, -1)).repeat_interleave(groups, dim=2)
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * mixer.q_map.scale
    distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).double()
    if c.decay == "fixed":
        rate = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(c.kv_heads)], dtype=torch.float64)
        weights = weights * rate.repeat_interleave(groups)[:, None, None] ** distance.clamp(min=0)
    weights = weights * (distance >= 0)
    if c.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + c.eps)
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    return mixer.o_proj((out if mixer.o_norm is None else mixer.o_norm(out)).flatten(-2))


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 3, "chunk_size": 4},
        {"num_heads": 4, "num_kv_heads": 2, "feature_map": "hedgehog", "chunk_size": 11},
        {"num_heads": 4, "num_kv_heads": 2, "feature_map": "hedgehog_lolcats", "chunk_size": 3},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 5, "feature_map": "relu", "feature_dim": 7},
        {"num_heads": 2, "feature_map": "dpfp", "eps": 0.1},
        {"num_heads": 4, "num_kv_heads": 2, "feature_map": "hadamard", "normalize": False, "decay": "fixed"},
        {"num_heads": 2, "feature_map": "t2r", "decay": "fixed", "norm_output": True, "chunk_size": 1},
        {"num_heads": 2, "type": "based", "feature_dim": 3},
    ],
)
def test_layer_equals_the_written_out_sum(config: dict) -> None:
    mixer, x = build(**config), tokens()
    torch.testing.assert_close(mixer(x).hidden, written_out(mixer, x), rtol=0, atol=1e-11)


def test_rotation_makes_weights_depend_on_distance_alone() -> None:
    mixer = build(num_heads=2, feature_map="identity", normalize=False, use_rope=True, norm_output=False)
    x = tokens(1).expand(2, 7, 12)  # the same token seven times: only positions differ
    steps = mixer(x).hidden.diff(dim=1, prepend=torch.zeros(2, 1, 12, dtype=torch.float64))
    # the increment at t is the weight of distance t times the same value, whatever was read before
    shifted = mixer(x[:, :4], mixer(x[:, :3], return_state=True).state).hidden
    torch.testing.assert_close(steps.cumsum(1)[:, 3:], shifted, rtol=0, atol=1e-12)
    assert float((steps[:, 1] - steps[:, 2]).detach().abs().max()) > 1e-6


def test_chunk_size_of_a_call_changes_no_number() -> None:
    mixer, x = build(num_heads=3, chunk_size=64), tokens(23)
    expected = mixer(x, return_state=True)
    for chunk_size in (1, 5, 8, 23):
        out = mixer(x, overrides={"chunk_size": chunk_size}, return_state=True)
        torch.testing.assert_close(out.hidden, expected.hidden, rtol=0, atol=1e-12)
        torch.testing.assert_close(out.state.memory, expected.state.memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("feature_map", "features"), [("taylor", 273), ("taylor_compact", 153)])
def test_state_bytes_of_the_paper(feature_map: str, features: int) -> None:
    config = {"type": "based", "d_model": 1024, "num_heads": 16, "feature_map": feature_map}
    with torch.device("meta"):
        mixer = build_mixer(config)
    counter = 8
    for num_tokens in (0, 2048, 10**6):
        assert mixer.state_num_bytes(num_tokens) == 16 * (64 + 1) * features * 4 + counter
    assert mixer.state_num_bytes(7, 3, torch.bfloat16) == 3 * mixer.state_num_bytes(7)  # sums stay float32


def test_grouped_heads_share_one_memory() -> None:
    state = build(num_heads=4, num_kv_heads=2).init_state(3)
    assert state.memory.shape[:2] == (3, 2)
    assert state.normalizer.shape[:2] == (3, 2)


def test_decay_rates_of_retnet() -> None:
    mixer = build(num_heads=4, feature_map="identity", normalize=False, decay="fixed")
    state = mixer(tokens(3), return_state=True).state
    later = mixer(torch.zeros(2, 1, 12, dtype=torch.float64), state, return_state=True).state
    for head in range(4):
        expected = state.memory[:, head] * (1 - 2.0 ** (-5 - head))
        torch.testing.assert_close(later.memory[:, head], expected, rtol=1e-12, atol=0)


def test_weights_of_based_are_at_least_one_half() -> None:
    maps = make_feature_map("taylor_compact", 4).double()
    x = 5 * torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.einsum("ihk,jhk->ij", maps(x), maps(x))
    assert float(weights.min()) >= 0.5 - 1e-9


def test_weight_decay_spares_biases_and_norms() -> None:
    mixer = build(num_heads=2, feature_map="t2r", norm_output=True)
    spared = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert spared == {"q_map.proj.bias", "k_map.proj.bias", "o_norm.weight"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 5}, "d_model must be a multiple of num_heads, got 12 and 5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_heads": 2, "feature_map": "identity"}, "normalize=True needs weights that cannot be negative"),
        ({"num_heads": 2, "feature_map": "hadamard"}, "Set normalize=False"),
        ({"num_heads": 2, "feature_map": "hedgehogs"}, "Did you mean 'hedgehog'"),
        ({"num_heads": 2, "decay": "fix"}, "Did you mean 'fixed'"),
        ({"num_heads": 2, "eps": -1.0}, "eps must be at least 0"),
        ({"num_heads": 2, "eps": math.nan}, "eps must be at least 0"),
        ({"num_heads": 2, "eps": "1e-6"}, "eps must be a number, got '1e-6'"),
        ({"num_heads": 2, "eps": 0.0, "feature_map": "dpfp"}, "eps must be above 0 with feature_map='dpfp'"),
        ({"num_heads": 2, "normalize": "no"}, "normalize must be true or false, got 'no'"),
        ({"num_heads": 2, "feature_dim": 3, "use_rope": True}, "even"),
        ({"num_heads": 2, "chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"num_heads": 2, "num_head": 2}, "Did you mean 'num_heads'"),
    ],
)
def test_refused_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "linear_attention", "d_model": 12, **config})
