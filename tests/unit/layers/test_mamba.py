"""Mamba layers: sizes of the published models, initial values, float32 parameters, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from memzoo import configs
from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.contract import build_context
from memzoo.models.checkpoints.mamba import mamba_config, mamba_config_values
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM

CONFIGS = {
    "mamba1": {"type": "mamba1", "d_model": 16, "d_state": 4},
    "mamba2": {"type": "mamba2", "d_model": 16, "d_state": 4, "head_dim": 4},
    "mamba3": {"type": "mamba3", "d_model": 16, "d_state": 4, "head_dim": 4},
}


def step_bias(mixer: TokenMixer) -> Tensor:
    return mixer.dt_proj.bias if mixer.config.type == "mamba1" else mixer.dt_bias


def shapes(mixer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in mixer.state_dict().items()}


def test_names_and_shapes_of_mamba_130m() -> None:
    with torch.device("meta"):
        mixer = build_mixer({"type": "mamba1", "d_model": 768})
    assert shapes(mixer) == {
        "A_log": (1536, 16),
        "D": (1536,),
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "out_proj.weight": (768, 1536),
    }


def test_names_and_shapes_of_mamba2_130m_and_370m() -> None:
    with torch.device("meta"):
        mixer = build_mixer({"type": "mamba2", "d_model": 768})
        larger = build_mixer({"type": "mamba2", "d_model": 1024})
    assert shapes(mixer) == {
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 4),
        "conv1d.bias": (1792,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert tuple(larger.in_proj.weight.shape) == (4384, 1024)


def test_names_and_shapes_of_mamba3() -> None:
    with torch.device("meta"):
        mixer = build_mixer({"type": "mamba3", "d_model": 768, "norm_output": True})
    assert shapes(mixer) == {
        "in_proj.weight": (2 * 1536 + 2 * 128 + 3 * 24 + 32, 768),
        "B_norm.weight": (128,),
        "C_norm.weight": (128,),
        "B_bias": (24, 1, 128),
        "C_bias": (24, 1, 128),
        "dt_bias": (24,),
        "D": (24,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert mixer.state_num_bytes(1000) == 4 * 24 * (128 * 64 + 32 + 128 + 64) + 8


@pytest.mark.parametrize(("name", "expected"), [("mamba_130m", 129_135_360), ("mamba2_130m", 128_989_632)])
def test_shipped_models_are_the_published_ones(name: str, expected: int) -> None:
    config = ModelConfig.from_dict(yaml.safe_load(configs.find(f"models/{name}").read_text()))
    model = MemoryLM(config, device="meta")
    assert sum(x.numel() for x in model.parameters()) == expected
    written = mamba_config_values(config, "state_spaces")
    assert written["pad_vocab_size_multiple"] == 1
    again = mamba_config(written, "the file")
    assert (again.mixers, again.mlps, again.vocab_size) == (config.mixers, config.mlps, config.vocab_size)


@pytest.mark.parametrize(("layer", "num_bytes"), [("mamba1", 122_880), ("mamba2", 815_104)])
def test_state_bytes_of_the_published_models(layer: str, num_bytes: int) -> None:
    """Theirs keep one input of the convolution more, ours a counter."""
    with torch.device("meta"):
        mixer = build_mixer({"type": layer, "d_model": 768})
    channels = mixer.conv1d.weight.shape[0]
    assert mixer.state_num_bytes(1000) == num_bytes - 4 * channels + 8


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_bias_survives_the_building_of_a_model(name: str) -> None:
    layers = [{key: x for key, x in CONFIGS[name].items() if key != "d_model"}] * 2
    config = ModelConfig(vocab_size=11, d_model=16, layers=layers, mlp={"type": "swiglu", "d_ff": 8})
    torch.manual_seed(0)
    built, materialized = MemoryLM(config), MemoryLM(config, device="meta").materialize()
    again = MemoryLM(config)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.reset_parameters()
    for model in (built, materialized, again):
        for block in model.blocks:
            steps = F.softplus(step_bias(block.mixer).detach())
            assert 1e-4 * 0.999 <= float(steps.min()) <= float(steps.max()) <= 0.1 * 1.001
            assert float(steps.max() / steps.min()) > 2
            assert torch.equal(block.mixer.D, torch.ones_like(block.mixer.D))


def test_initial_rates() -> None:
    torch.manual_seed(0)
    rows = build_mixer(CONFIGS["mamba1"]).A_log.detach().exp()
    torch.testing.assert_close(rows, torch.arange(1.0, 5.0).expand(32, 4))
    rates = build_mixer({**CONFIGS["mamba2"], "d_model": 256}).A_log.detach().exp()
    assert 1 <= float(rates.min()) < 2
    assert 15 < float(rates.max()) <= 16


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_projection_is_scaled_by_the_depth(name: str) -> None:
    plain, deep = (build_mixer({**CONFIGS[name], "num_residuals": n}) for n in (1, 16))
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < float(plain.out_proj.weight.detach().abs().max()) <= bound
    assert 0.9 * bound / 4 < float(deep.out_proj.weight.detach().abs().max()) <= bound / 4


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_is_for_projections_alone(name: str) -> None:
    mixer = build_mixer({**CONFIGS[name], **({} if name == "mamba3" else {"use_bias": True})})
    decayed = {n for n, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == {n for n, p in mixer.named_parameters() if n.endswith("_proj.weight")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_rates_and_steps_stay_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixer = build_mixer(CONFIGS[name])
    mixer(torch.randn(1, 5, 16)).hidden.sum().backward()
    kept = {n: (p.detach().clone(), p.grad.clone()) for n, p in mixer.named_parameters()}
    model = nn.Sequential(mixer).to(dtype)
    for n, p in mixer.named_parameters():
        if n in mixer.float32_parameters:
            assert p.dtype == p.grad.dtype == torch.float32
            assert torch.equal(p, kept[n][0])
            assert torch.equal(p.grad, kept[n][1].to(dtype).float())
            assert p._no_weight_decay
        else:
            assert p.dtype == p.grad.dtype == dtype
    assert model.double()[0].D.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "mamba1", "d_state": 0}, "d_state must be an integer of at least 1"),
        ({"type": "mamba1", "dt_rank": 0}, "dt_rank must be an integer"),
        ({"type": "mamba1", "dt_min": 0.2}, "dt_min 0.2, dt_max 0.1"),
        ({"type": "mamba1", "head_dim": 4}, "unknown key 'head_dim'"),
        ({"type": "mamba2", "head_dim": 5}, "head_dim must divide .* 5 and 2 \\* 16"),
        ({"type": "mamba2", "head_dim": 4, "num_groups": 3}, "3 groups for 8 heads"),
        ({"type": "mamba2", "head_dim": 4, "rate_range": (0.0, 1.0)}, "rate_range must be"),
        ({"type": "mamba2", "head_dim": 4, "dt_limit": (1.0, 0.5)}, "dt_limit must be"),
        ({"type": "mamba3", "head_dim": 5}, "head_dim must divide .* 5 and 2 \\* 16"),
        ({"type": "mamba3", "head_dim": 4, "num_groups": 3}, "3 groups for 8 heads"),
        (
            {"type": "mamba3", "head_dim": 4, "rope_fraction": 1.5},
            "rope_fraction must be a number from 0 to 1",
        ),
        ({"type": "mamba3", "head_dim": 4, "rate_floor": 0}, "rate_floor must be a number between 0 and 1"),
        ({"type": "mamba2", "head_dim": 4, "norm_eps": 0.0}, "norm_eps must be a number between 0 and 1"),
    ],
)
def test_errors_name_the_thing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"d_model": 16, **changes})


def test_mamba3_without_rotation_still_runs() -> None:
    torch.manual_seed(0)
    mixer = build_mixer({**CONFIGS["mamba3"], "rope_fraction": 0.0}).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole = mixer(x, return_state=True)
    assert whole.state.angle.shape == (2, 8, 0)
    out = mixer(x[:, :4], return_state=True)
    torch.testing.assert_close(mixer(x[:, 4:], out.state).hidden, whole.hidden[:, 4:], rtol=0, atol=1e-10)


def test_mamba3_holds_a_parity() -> None:
    """A rotation by pi for every one, and none for a zero, is the parity of all ones read so far."""
    mixer = build_mixer({**CONFIGS["mamba3"], "d_state": 2, "rope_fraction": 1.0}).double()
    with torch.no_grad():
        for bias in (mixer.B_bias, mixer.C_bias):
            bias.copy_(torch.tensor([1.0, 0.0]).expand_as(bias))
        mixer.D.zero_()
    bits = torch.randint(2, (1, 40), generator=torch.Generator().manual_seed(0))
    ctx = build_context((1, 40), torch.device("cpu"))
    nothing = torch.zeros(1, 40, 1, 2, dtype=torch.float64)
    x = torch.zeros(1, 40, 8, 4, dtype=torch.float64)
    x[:, 0] = 1  # one token is remembered for good
    ones = torch.ones(1, 40, 8, dtype=torch.float64)
    angle = torch.where(bits == 1, 40.0, 0.0).double()[..., None]  # tanh saturates: pi or nothing
    y, _ = mixer.recur(nothing, nothing, x, ones, -1e-9 * ones, ones, angle, ctx, None)
    parity = (bits[:, 1:].cumsum(1) % 2).double()
    torch.testing.assert_close(y[0, 1:, 0, 0], 1 - 2 * parity[0], rtol=0, atol=1e-6)
