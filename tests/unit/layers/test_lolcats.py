"""The LoLCATs layer against its formula under a written-out mask; its window alone; its switches."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import use_backend
from memzoo.layers import TokenMixer, build_mixer, probe
from memzoo.layers.contract import build_context

HEADS = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def build(kind: str = "lolcats", *, seed: int = 0, **config: object) -> TokenMixer:
    torch.manual_seed(seed)
    mixer = build_mixer({"type": kind, **HEADS, **config}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return mixer


def tokens(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(2, num_tokens, 16, generator=generator, dtype=torch.float64)


def written_out(mixer: TokenMixer, x: Tensor) -> Tensor:
    """Eq. 7 of the paper with full matrices."""
    c = mixer.config
    q, k, v = mixer.project(x, build_context(x.shape[:2], x.device))
    k, v = (y.repeat_interleave(c.num_heads // c.kv_heads, dim=2) for y in (k, v))
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    if c.window == "sliding":
        is_near = i - j < c.window_size
    else:
        is_near = j >= (i // c.window_size - 1) * c.window_size
    is_near = (j <= i) & (is_near | (j < c.num_sinks))
    is_far = (j <= i) & ~is_near
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    near = logits.masked_fill(~is_near, float("-inf"))
    near = (near - near.amax(-1, keepdim=True)).exp()
    far = torch.einsum("bihk,bjhk->bhij", mixer.q_map(q), mixer.k_map(k)) * is_far
    gamma = mixer.window_factor.sigmoid()[:, None, None]
    weights = gamma * near + (1 - gamma if c.is_affine else 1) * far
    out = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    return mixer.o_proj(out.flatten(-2))


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 27])
@pytest.mark.parametrize(
    "config",
    [
        {"window_size": 4},
        {
            "window_size": 4,
            "num_sinks": 2,
            "is_affine": True,
            "qk_norm": True,
            "qkv_bias": True,
            "o_bias": True,
        },
        {"window_size": 3, "num_sinks": 7},
        {"window_size": 1},
        {"window_size": 4, "window": "terrace"},
        {"window_size": 4, "window": "terrace", "num_sinks": 3, "is_affine": True},
        {"window_size": 2, "window": "terrace", "num_sinks": 7, "rope_theta": None},
    ],
)
def test_layer_equals_the_written_out_formula(config: dict, num_tokens: int) -> None:
    mixer, x = build(feature_dim=3, chunk_size=5, **config), tokens(num_tokens)
    torch.testing.assert_close(mixer(x).hidden, written_out(mixer, x), rtol=0, atol=1e-11)


def test_short_sequence_is_window_attention_bit_by_bit() -> None:
    mixer = build(window_size=9, num_sinks=2, feature_dim=3)
    plain = build("sliding_window", window_size=9, num_sinks=2)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = tokens(9)
    with use_backend("torch"):  # the same implementation on both sides
        assert torch.equal(mixer(x).hidden, plain(x).hidden)
    state, other = mixer.init_state(2), plain.init_state(2)
    for t in range(9):
        out, expected = mixer.step(x[:, t], state), plain.step(x[:, t], other)
        assert torch.equal(out.hidden, expected.hidden)
        state, other = out.state, expected.state
    assert not bool(state.memory.any())


@pytest.mark.parametrize(("window", "num_tokens"), [("sliding", 6), ("terrace", 12)])
def test_short_sequence_is_full_attention(window: str, num_tokens: int) -> None:
    mixer = build(window_size=6, window=window, feature_dim=3)
    full = build("attention")
    full.load_state_dict(mixer.state_dict(), strict=False)
    x = tokens(num_tokens + 1)
    torch.testing.assert_close(
        mixer(x[:, :num_tokens]).hidden, full(x[:, :num_tokens]).hidden, rtol=0, atol=1e-13
    )
    assert float((mixer(x).hidden - full(x).hidden).detach().abs().max()) > 1e-6


@pytest.mark.parametrize("window", ["sliding", "terrace"])
def test_nothing_of_the_linear_part_is_trained_while_the_window_holds_everything(window: str) -> None:
    mixer = build(window_size=6, window=window, feature_dim=3)
    reach = 6 if window == "sliding" else 12
    for num_tokens, is_trained in ((reach, False), (reach + 1, True)):
        mixer.zero_grad()
        mixer(tokens(num_tokens)).hidden.square().sum().backward()
        for parameter in (mixer.q_map.weight, mixer.k_map.weight, mixer.window_factor):
            assert bool((parameter.grad.abs() > 1e-12).any()) == is_trained


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_memory_switched_off_is_window_attention(num_sinks: int) -> None:
    mixer = build(window_size=4, num_sinks=num_sinks, feature_dim=3)
    plain = build("sliding_window", window_size=4, num_sinks=num_sinks)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = tokens(15)
    mixer.memory_enabled = False
    out, expected = mixer(x, return_state=True), plain(x, return_state=True)
    assert torch.equal(out.hidden, expected.hidden)
    assert out.state.memory is None
    assert mixer.state_num_bytes(15, 2, torch.float64) == out.state.num_bytes()
    step, expected_step = mixer.step(x[:, 0], out.state), plain.step(x[:, 0], expected.state)
    assert torch.equal(step.hidden, expected_step.hidden)
    configured = build(window_size=4, num_sinks=num_sinks, feature_dim=3, memory_enabled=False)
    configured.load_state_dict(mixer.state_dict())
    assert torch.equal(configured(x).hidden, out.hidden)


def test_state_of_the_other_switch_is_refused() -> None:
    mixer, x = build(window_size=4, feature_dim=3), tokens(6)
    state = mixer(x, return_state=True).state
    mixer.memory_enabled = False
    with pytest.raises(ValueError, match="switched off, but the state was made with it on"):
        mixer(x, state)


@pytest.mark.parametrize("window", ["sliding", "terrace"])
def test_window_of_a_call_replaces_the_configured_one(window: str) -> None:
    mixer = build(window_size=8, num_sinks=1, window=window, feature_dim=3)
    other = build(window_size=3, num_sinks=2, window=window, feature_dim=3)
    x, overrides = tokens(20), {"window_size": 3, "num_sinks": 2}
    assert torch.equal(mixer(x, overrides=overrides).hidden, other(x).hidden)
    with pytest.raises(ValueError, match="only in calls without a state"):
        mixer(x, overrides=overrides, return_state=True)


def test_probe_and_extras() -> None:
    mixer, x = build(window_size=4, feature_dim=3), tokens(9)
    with probe() as seen:
        out = mixer(x, return_extras=True)
    (share,) = seen["window_share"]
    assert share.shape == (2, 9, 4)
    assert bool((share[:, :4] == 1).all())
    assert bool((share[:, 4:] < 1).all())
    heads = out.extras["head_outputs"]
    assert heads.shape == (2, 9, 4, 6)
    torch.testing.assert_close(mixer.o_proj(heads.flatten(-2)), out.hidden, rtol=0, atol=0)


def test_state_sizes_of_the_paper() -> None:
    config = {"type": "lolcats", "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "window_size": 64}
    with torch.device("meta"):
        mixer = build_mixer(config)
    memory, window, counters = 32 * 128 * (128 + 1) * 4, 2 * 64 * 8 * 128 * 2, 16
    assert mixer.state_num_bytes(10**6, 1, torch.bfloat16) == memory + window + counters


def test_window_share_starts_at_one_tenth_and_is_not_decayed() -> None:
    mixer = build_mixer({"type": "lolcats", **HEADS})
    torch.testing.assert_close(mixer.window_factor.sigmoid(), torch.full((4,), 0.1))
    assert mixer.window_factor._no_weight_decay


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window": "slide"}, "Did you mean 'sliding'"),
        ({"window_size": 0}, "window_size must be an integer of at least 1"),
        ({"num_sinks": -1}, "num_sinks must be an integer of at least 0"),
        ({"feature_dim": 0}, "feature_dim must be an integer of at least 1"),
    ],
)
def test_refused_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "lolcats", **HEADS, **config})
