"""Gated linear attention: the written-out recurrence, presets, first decays, refused configurations."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import TokenMixer, build_mixer, mixer_config, register_preset
from memzoo.layers.presets import PRESETS
from memzoo.layers.registry import _MIXERS


def build(**config: object) -> TokenMixer:
    torch.manual_seed(0)
    mixer = build_mixer({"type": "gated_linear_attention", "d_model": 12, **config}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return mixer


def tokens(num_tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, num_tokens, 12, generator=generator, dtype=torch.float64)


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """sum_i taps_i x_{t - K + 1 + i}, zeros before the start."""
    padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
    return sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1]))


def log_decay(mixer: TokenMixer, x: Tensor) -> Tensor:
    """(B, T, HV, 1 or K) by the formulas of parts/decay.py."""
    c, part = mixer.config, mixer.decay
    if c.decay.endswith("channel"):
        logits = x @ part.proj.down.weight.T @ part.proj.up.weight.T
        heads = (c.value_heads, c.key_width)
        if c.decay == "sigmoid_channel":
            return torch.log(torch.sigmoid(logits + part.proj.up.bias)).unflatten(-1, heads) / 16
        logits, rate = (logits + part.dt_bias).unflatten(-1, heads), part.A_log.exp()[:, None]
        if c.decay_bound is not None:
            return c.decay_bound / (1 + torch.exp(-rate * logits))
        return -rate * torch.log1p(torch.exp(logits))
    return per_head(mixer, x)[..., None]


def per_head(mixer: TokenMixer, x: Tensor) -> Tensor:
    """(B, T, HV)."""
    c, part = mixer.config, mixer.decay
    if c.decay == "none":
        return x.new_zeros(*x.shape[:2], c.value_heads)
    if c.decay == "fixed":
        rates = [math.log(1 - 2.0 ** (-5 - head)) for head in range(c.value_heads)]
        return torch.tensor(rates, dtype=x.dtype).expand(*x.shape[:2], -1)
    if c.decay == "sigmoid_head":
        return torch.log(torch.sigmoid(x @ part.proj.weight.T + part.proj.bias)) / 16
    return -part.A_log.exp() * torch.log1p(torch.exp(x @ part.proj.weight.T + part.dt_bias))


def written_out(mixer: TokenMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and memory by a loop over tokens and the formula of the module docstring."""
    c = mixer.config
    heads = [linear(x) for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if mixer.conv is not None:
        heads = convolved(torch.cat(heads, -1), mixer.conv.weight).split([h.shape[-1] for h in heads], -1)
    if c.activation == "silu":
        heads = [h * torch.sigmoid(h) for h in heads]
    q, k, v = (
        h.unflatten(-1, (n, -1))
        for h, n in zip(heads, (c.num_heads, c.key_heads, c.value_heads), strict=True)
    )
    if c.feature_map == "l2_norm":
        q, k = (h / (h.square().sum(-1, keepdim=True) + 1e-6).sqrt() for h in (q, k))
    q = q.repeat_interleave(c.output_heads // c.num_heads, 2) * c.key_width**-0.5
    k = k.repeat_interleave(c.value_heads // c.key_heads, 2)
    decay = log_decay(mixer, x).exp()
    memory = x.new_zeros(2, c.value_heads, c.key_width, c.value_width)
    outputs = []
    for t in range(x.shape[1]):
        memory = decay[:, t, :, :, None] * memory
        written = v[:, t]
        if c.rule == "delta":
            beta = torch.sigmoid(mixer.beta.proj(x[:, t])) * (2 if c.allow_neg_eigval else 1)
            written = beta[..., None] * (written - torch.einsum("bhk,bhke->bhe", k[:, t], memory))
        memory = memory + k[:, t, :, :, None] * written[:, :, None]
        read = memory.repeat_interleave(c.output_heads // c.value_heads, 1)
        outputs.append(torch.einsum("bhk,bhke->bhe", q[:, t], read))
    out = torch.stack(outputs, 1)
    out = out / (out.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * mixer.o_norm.weight
    if mixer.gate is not None:
        gate = mixer.gate.proj(x)
        if c.gate_low_rank:
            assert mixer.gate.proj.down.weight.shape[0] == c.value_width
        gate = gate.unflatten(-1, (c.output_heads, -1))
        out = out * (torch.sigmoid(gate) * (gate if c.gate == "silu" else 1))
    return mixer.o_proj(out.flatten(-2)), memory


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 3, "chunk_size": 4},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 5, "value_dim": 3, "decay": "fixed"},
        {"num_heads": 2, "num_value_heads": 4, "decay": "sigmoid_head", "gate": "silu", "chunk_size": 4},
        {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.5, "activation": "silu", "feature_map": "l2_norm"},
        {"num_heads": 2, "conv_size": 3, "decay": "softplus_head", "gate": "sigmoid", "gate_low_rank": True},
        {"num_heads": 2, "num_value_heads": 4, "decay": "sigmoid_channel", "chunk_size": 4},
        {
            "num_heads": 2,
            "decay": "softplus_channel",
            "rule": "delta",
            "feature_map": "l2_norm",
            "chunk_size": 4,
        },
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "decay": "softplus_head",
            "rule": "delta",
            "feature_map": "l2_norm",
        },
        {
            "num_heads": 2,
            "num_value_heads": 4,
            "decay": "softplus_channel",
            "decay_bound": -5.0,
            "rule": "delta",
            "feature_map": "l2_norm",
            "allow_neg_eigval": True,
        },
        {"num_heads": 4, "num_kv_heads": 2, "conv_size": 4, "activation": "silu", "feature_map": "l2_norm"},
    ],
)
def test_layer_equals_the_written_out_recurrence(config: dict) -> None:
    mixer, x = build(**config), tokens()
    expected, memory = written_out(mixer, x)
    out = mixer(x, return_state=True)
    torch.testing.assert_close(out.hidden, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(out.state.memory, memory, rtol=0, atol=1e-11)


def test_tail_holds_queries_keys_and_values_before_the_convolution() -> None:
    mixer, x = build(num_heads=2, conv_size=4, activation="silu"), tokens()
    joined = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
    torch.testing.assert_close(mixer(x, return_state=True).state.tail, joined[:, -3:], rtol=0, atol=0)
    short = mixer(x[:, :2], return_state=True).state.tail  # fewer tokens than taps
    torch.testing.assert_close(short[:, 1:], joined[:, :2], rtol=0, atol=1e-15)
    assert not bool(short[:, 0].any())


def test_first_decays_lie_in_their_ranges_and_survive_zeroed_biases() -> None:
    torch.manual_seed(0)
    mixer = build_mixer(
        {"type": "gated_linear_attention", "d_model": 256, "num_heads": 64, "decay": "softplus_head"}
    )
    for module in mixer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    step = F.softplus(mixer.decay.dt_bias.detach())
    assert 9e-4 < float(step.min()) < 4e-3 < 3e-2 < float(step.max()) < 0.11
    rate = mixer.decay.A_log.detach().exp()
    assert 0 < float(rate.min()) < 2 < 14 < float(rate.max()) < 16


def test_weight_decay_spares_decays_biases_convolutions_and_norms() -> None:
    spared = set()
    for config in (
        {"decay": "softplus_head", "conv_size": 2, "gate": "silu", "gate_low_rank": True, "rule": "delta"},
        {"decay": "softplus_channel"},
        {"decay": "sigmoid_channel"},
        {"decay": "sigmoid_head", "gate": "silu"},
    ):
        parameters = build(num_heads=2, **config).named_parameters()
        spared |= {name for name, p in parameters if getattr(p, "_no_weight_decay", False)}
    assert spared == {
        "decay.A_log",
        "decay.dt_bias",
        "decay.proj.bias",
        "decay.proj.up.bias",
        "conv.weight",
        "o_norm.weight",
    }


@pytest.mark.parametrize(
    ("preset", "d_model", "num_heads", "widths"),
    [
        ("retnet", 2048, 8, (256, 512)),
        ("simple_gla", 1024, 4, (256, 256)),
        ("rebased", 1024, 16, (16, 64)),
        ("gla", 1024, 4, (128, 256)),
        ("delta_net", 1024, 4, (256, 256)),
        ("gated_delta_net", 2048, 6, (256, 512)),
        ("kda", 2048, 16, (128, 128)),
    ],
)
def test_presets_have_the_published_widths(preset: str, d_model: int, num_heads: int, widths: tuple) -> None:
    with torch.device("meta"):
        mixer = build_mixer({"type": preset, "d_model": d_model, "num_heads": num_heads})
    rows = [linear.weight.shape[0] for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    assert rows == [num_heads * widths[0], num_heads * widths[0], num_heads * widths[1]]


def test_a_preset_is_its_base_with_other_defaults() -> None:
    values = {"d_model": 16, "num_heads": 2}
    for name, preset in PRESETS.items():
        made = mixer_config({"type": name, **values}).to_dict()
        assert made == {
            **mixer_config({"type": preset.base, **preset.defaults, **values}).to_dict(),
            "type": name,
        }
    assert mixer_config({"type": "retnet", **values, "gate": "none"}).gate == "none"


def test_steps_of_two_and_rounded_keys_keep_a_memory_bounded() -> None:
    """One token again and again: its key is rounded to a length above one, and every step is 2 to the bit."""
    mixer = build_mixer({"type": "delta_net", "d_model": 12, "num_heads": 3, "allow_neg_eigval": True})
    mixer.conv.init_identity()
    with torch.no_grad():
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
            proj.weight.normal_(generator=torch.Generator().manual_seed(1))
        mixer.beta.proj.weight.fill_(10)
    mixer = mixer.bfloat16()
    x = torch.ones(1, 1, 12, dtype=torch.bfloat16).expand(1, 4095, 12)
    seen = []
    mixer.k_map.register_forward_hook(lambda *call: seen.append(call[2]))
    early = mixer(x[:, :63], return_state=True).state.memory
    late = mixer(x, return_state=True).state.memory
    assert seen[0][0, -1].float().square().sum(-1).max() > 1.004  # the case is the one that it should be
    assert late.abs().max() < 2 * early.abs().max()


def test_presets_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memzoo.layers.registry._MIXERS", dict(_MIXERS))
    register_preset("short_retnet", "retnet", {"conv_size": 2})
    config = mixer_config({"type": "short_retnet", "d_model": 12, "num_heads": 2})
    assert (config.conv_size, config.decay, config.type) == (2, "fixed", "short_retnet")
    with pytest.raises(ValueError, match=r"has no field 'conv_sise'\. Did you mean 'conv_size'"):
        register_preset("other", "retnet", {"conv_sise": 2})
    with pytest.raises(ValueError, match="Did you mean 'retnet'"):
        register_preset("other", "rtnet", {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 5}, r"expand_v \* d_model must be a positive multiple of the 5 heads, got 1.0 \* 12"),
        ({"num_heads": 4, "expand_k": 0.3, "value_dim": 2}, r"expand_k \* d_model .* Or set head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_heads": 4, "num_value_heads": 6}, "num_value_heads must be a multiple of num_heads"),
        ({"num_heads": 4, "num_kv_heads": 2, "num_value_heads": 8}, "4 query and 2 key heads"),
        ({"num_heads": 2, "decay": "softplus"}, "Did you mean 'softplus_head'"),
        ({"num_heads": 2, "gate": "swish"}, "gate 'swish' is unknown"),
        ({"num_heads": 2, "gate_low_rank": True}, 'gate_low_rank has no effect with gate="none"'),
        ({"num_heads": 2, "decay_bound": -5.0}, 'needs decay="softplus_channel", got -5.0'),
        (
            {"num_heads": 2, "decay": "softplus_channel", "decay_bound": 5.0},
            "decay_bound must be a number below 0",
        ),
        ({"num_heads": 2, "allow_neg_eigval": True}, "got 'additive' and 'identity'"),
        ({"num_heads": 2, "allow_neg_eigval": True, "rule": "delta"}, "a step above 1 diverges"),
        ({"num_heads": 2, "rule": "deltas"}, "Did you mean 'delta'"),
        ({"num_heads": 2, "conv_size": -1}, "conv_size must be an integer of at least 1"),
        ({"num_heads": 2, "norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"num_heads": 2, "norm_eps": float("inf")}, "norm_eps must be above 0 and finite, got inf"),
        ({"num_heads": 2, "norm_eps": "1e-6"}, "norm_eps must be a number, got '1e-6'.* write 1.0e-5"),
        ({"num_heads": 4, "use_rope": True}, "even width, got 3.*use_rope: false"),
        ({"num_heads": 2, "use_rope": "no"}, "use_rope must be true or false, got 'no'"),
        ({"num_heads": 2, "use_rope": True, "rope_theta": None}, "rope_theta must be a number, got None"),
        ({"num_heads": 2, "conv_size": None}, "conv_size must be an integer"),
        ({"num_heads": 2, "expand_k": "0.5"}, "expand_k must be a number, got '0.5'"),
        ({"num_heads": 2, "decay": "softplus_channel", "decay_bound": "-5"}, "decay_bound must be a number"),
        ({"num_heads": 2, "decay_bound": True}, "decay_bound must be a number, got True"),
        ({"num_heads": 2, "decay": None}, "decay must be text, got None"),
        ({"num_heads": 2, "type": ["gla"]}, r"mixer type \['gla'\] is unknown"),
        ({"num_heads": 2, "num_head": 2}, "Did you mean 'num_heads'"),
    ],
)
def test_refused_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "gated_linear_attention", "d_model": 12, **config})
