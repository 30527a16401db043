"""Toy Gated DeltaNet layers of transformers against ours: outputs, steps, gradients, weights, both ways."""

import json

import pytest
import torch
from transformers import DynamicCache, OlmoHybridConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

import memzoo
from memzoo.layers import build_mixer
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.gated_delta_net import (
    HYBRID_FAMILIES,
    LAYOUTS,
    export_gated_delta_net,
    gated_delta_net_config,
    gated_delta_net_values,
    load_gated_delta_net,
)

WIDTH = 10
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
    "rms_norm_eps": 1e-3,
}
FEWER_HEADS = {"linear_num_value_heads": 2, "linear_key_head_dim": 3, "linear_conv_kernel_dim": 4}

# name -> (layout, module, class prefix, config class, changes)
LAYERS = {
    "qwen3_next": ("qwen3_next", modeling_qwen3_next, "Qwen3Next", Qwen3NextConfig, {}),
    "qwen3_next-equal-heads": ("qwen3_next", modeling_qwen3_next, "Qwen3Next", Qwen3NextConfig, FEWER_HEADS),
    "qwen3_5": ("qwen3_5", modeling_qwen3_5, "Qwen3_5", Qwen3_5TextConfig, {}),
    "olmo_hybrid": ("olmo_hybrid", modeling_olmo_hybrid, "OlmoHybrid", OlmoHybridConfig, {}),
    "olmo_hybrid-small-steps": (
        "olmo_hybrid",
        modeling_olmo_hybrid,
        "OlmoHybrid",
        OlmoHybridConfig,
        {**FEWER_HEADS, "linear_allow_neg_eigval": False},
    ),
}


class _Float64:
    """The torch module for code that calls for float32 whatever its input is."""

    def __getattr__(self, name: str):
        return torch.float64 if name == "float32" else getattr(torch, name)


def toy(name: str, dtype: torch.dtype = torch.float32):
    """A random layer of transformers, its config and its layout."""
    layout, module, prefix, config_class, changes = LAYERS[name]
    config = config_class(**{**SIZES, **changes})
    torch.manual_seed(0)
    layer = getattr(module, f"{prefix}GatedDeltaNet")(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return layer.to(dtype), config, layout


@pytest.fixture(params=LAYERS)
def source(request):
    return toy(request.param)


@pytest.fixture(params=LAYERS)
def source_float64(request, monkeypatch):
    """As `source`, in float64 throughout: as they are, its recurrence, norm and decays round to float32."""
    monkeypatch.setattr(LAYERS[request.param][1], "torch", _Float64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return toy(request.param, torch.float64)


def inputs(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=dtype)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("length", [1, 2, 64, 131])
def test_outputs_and_gradients_in_float64(source_float64, length):
    theirs, config, layout = source_float64
    ours = load_gated_delta_net(theirs.state_dict(), config.to_dict())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}
    x, y = (inputs(length, torch.float64).requires_grad_() for _ in range(2))
    expected, actual = theirs(x), ours(y).hidden
    assert largest(actual, expected) <= 1e-12 * max(1.0, float(expected.detach().abs().max()))
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    assert largest(y.grad, x.grad) <= 1e-10 * max(1.0, float(x.grad.abs().max()))
    # the gradients of the weights, laid out as theirs by the same functions
    with torch.no_grad():
        for parameter in ours.parameters():
            # a single token finds nothing to decay
            parameter.copy_(0 * parameter if parameter.grad is None else parameter.grad)
    gradients = export_gated_delta_net(ours, layout)
    for name, parameter in theirs.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert largest(gradients[name], parameter.grad) <= 1e-10 * scale, name


@torch.no_grad()
def test_prefill_then_steps(source):
    theirs, config, _ = source
    ours = load_gated_delta_net(theirs.state_dict(), config.to_dict())
    x = inputs(75)
    whole = theirs(x)
    assert largest(ours(x).hidden, whole) <= 1e-5 * max(1.0, float(whole.abs().max()))
    cache = DynamicCache(config=config)
    expected = theirs(x[:, :67], cache_params=cache)
    out = ours(x[:, :67], return_state=True)
    for t in range(67, 75):
        assert largest(out.hidden[:, -1], expected[:, -1]) <= 1e-5 * max(1.0, float(expected.abs().max()))
        expected = theirs(x[:, t : t + 1], cache_params=cache)
        out = ours.step(x[:, t], out.state)
        out.hidden = out.hidden[:, None]
    memory = cache.layers[0].recurrent_states
    memory = memory[0] if isinstance(memory, (dict, list, tuple)) else memory
    assert largest(out.state.memory, memory) <= 1e-5 * max(1.0, float(memory.abs().max()))


@torch.no_grad()
def test_every_token_alone(source):
    theirs, config, _ = source
    ours = load_gated_delta_net(theirs.state_dict(), config.to_dict())
    x = inputs(9)
    expected, state, pieces = theirs(x), ours.init_state(2), []
    for t in range(9):
        out = ours.step(x[:, t], state)
        state = out.state
        pieces.append(out.hidden)
    assert largest(torch.stack(pieces, 1), expected) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive_both_directions_bit_for_bit(source, dtype):
    theirs, config, layout = source
    theirs = theirs.to(dtype)
    before = theirs.state_dict()
    ours = load_gated_delta_net(before, config.to_dict())
    after = export_gated_delta_net(ours, layout)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)
    theirs.load_state_dict(after)  # strict
    assert gated_delta_net_config(gated_delta_net_values(ours.config, layout), layout) == ours.config
    # copies: training one leaves the other as it is
    kept = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert all(torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_layer_survives_every_layout(layout):
    is_apart = layout in ("olmo_hybrid", "flash_linear_attention")
    ours = build_mixer(
        {
            "type": "gated_delta_net",
            "d_model": WIDTH,
            "num_heads": 2,
            "num_value_heads": 4,
            "head_dim": 3,
            "value_dim": 5,
            "norm_eps": 1e-5,
            "allow_neg_eigval": is_apart,
        }
    )
    weights = {"unrelated": torch.ones(1), **export_gated_delta_net(ours, layout, prefix="a.0.")}
    again = load_gated_delta_net(weights, gated_delta_net_values(ours.config, layout), prefix="a.0.")
    assert again.config == ours.config
    before, after = ours.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    tags = [[vars(parameter) for parameter in layer.parameters()] for layer in (ours, again)]
    assert tags[0] == tags[1]
    assert again.to(torch.bfloat16).decay.A_log.dtype == torch.float32


def test_a_layer_in_the_file_of_a_whole_model(tmp_path):
    """Olmo Hybrid is stored with one convolution each for queries, keys and values."""
    from safetensors.torch import load_file

    config = OlmoHybridConfig(**SIZES, vocab_size=7, intermediate_size=4, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    theirs = modeling_olmo_hybrid.OlmoHybridForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.linear_attn."
    assert prefix + "q_conv1d.weight" in weights
    values = json.loads((tmp_path / "config.json").read_text())
    ours = load_gated_delta_net(weights, values, prefix=prefix)
    x = inputs(5)
    assert largest(ours(x).hidden, theirs.model.layers[0].linear_attn(x)) <= 1e-6
    exported = export_gated_delta_net(ours, "flash_linear_attention", prefix=prefix)
    stored = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    assert exported.keys() == stored.keys()
    # they cut their convolution into equal pieces, whatever belongs to keys and to values
    names = [f"{prefix}{part}_conv1d.weight" for part in "qkv"]
    assert [len(exported[name]) for name in names] == [10, 10, 18]
    assert [len(stored[name]) for name in names] == [13, 13, 12]
    for weights in (exported, stored):
        weights["convolution"] = torch.cat([weights.pop(name) for name in names])
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_the_text_part_of_a_config_is_found():
    theirs, config, _ = toy("qwen3_5")
    values = {"model_type": "qwen3_5", "text_config": config.to_dict()}
    assert load_gated_delta_net(theirs.state_dict(), values).config.value_heads == 6


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_whole_hybrids_are_refused_by_name(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(CheckpointError, match=f"'{family}'.*one by one"):
        memzoo.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_proj_ba.weight": None}, r"'p\.in_proj_ba\.weight' is missing"),
        ({"conv1d.bias": torch.zeros(38)}, r"'p\.conv1d\.bias' belongs to no part"),
        ({"A_log": torch.zeros(2)}, r"'p\.A_log' has shape \(2,\), the config implies \(6,\)"),
        ({"conv1d.weight": torch.zeros(38, 3)}, r"has shape \(38, 3\), the config implies \(38, 1, 3\)"),
        ({"in_proj_qkvz.weight": torch.zeros(55, WIDTH)}, r"\(55, 10\), the config implies \(56, 10\)"),
        ({"A_log": torch.zeros(6, dtype=torch.int64)}, r"'p\.A_log' has dtype torch\.int64"),
        (
            {"A_log": torch.zeros(6).to_sparse()},
            r"'p\.A_log' has .* layout torch\.sparse_coo, expected a dense",
        ),
    ],
)
def test_wrong_weights_are_named(change, message):
    theirs, config, _ = toy("qwen3_next")
    weights = {**theirs.state_dict(), **change}
    weights = {f"p.{name}": tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        load_gated_delta_net(weights, config.to_dict(), prefix="p.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_num_key_heads": None}, "no linear_num_key_heads, expected a positive integer"),
        ({"linear_num_key_heads": 4}, "num_value_heads must be a multiple of num_heads"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"linear_key_head_dim": 2**30, "linear_num_key_heads": 2}, "sizes|implies|possible"),
    ],
)
def test_wrong_configs_are_named(change, message):
    theirs, config, _ = toy("qwen3_next")
    values = {key: value for key, value in {**config.to_dict(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_gated_delta_net(theirs.state_dict(), values)


def test_weights_of_something_else():
    _, config, _ = toy("qwen3_next")
    with pytest.raises(CheckpointError, match=r"no weight of a Gated DeltaNet.*It has 'mlp\.weight'"):
        load_gated_delta_net({"mlp.weight": torch.ones(2)}, config.to_dict())
    with pytest.raises(CheckpointError, match=r"layer 'model\.' has no weight.*No name begins so"):
        load_gated_delta_net({"mlp.weight": torch.ones(2)}, config.to_dict(), prefix="model.")


def test_what_is_no_mapping():
    theirs, config, _ = toy("qwen3_next")
    with pytest.raises(TypeError, match=r"got Qwen3NextConfig\. Give config\.to_dict"):
        load_gated_delta_net(theirs.state_dict(), config)
    with pytest.raises(TypeError, match="weights must map names to tensors, got str"):
        load_gated_delta_net("model.safetensors", config.to_dict())


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("qwen3_next", {"type": "kda"}, "decay='softplus_channel'.*'softplus_head' only"),
        ("qwen3_next", {"type": "gla"}, "rule='additive'"),
        ("qwen3_5", {"allow_neg_eigval": True}, "allow_neg_eigval=True"),
        ("qwen3_5", {"num_kv_heads": 1}, "num_kv_heads=1"),
        ("qwen3_5", {"conv_size": 0}, "no convolution"),
        ("olmo_hybrid", {"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ("qwen3-next", {}, "Did you mean 'qwen3_next'"),
    ],
)
def test_what_a_layout_cannot_express_is_named(layout, change, message):
    ours = build_mixer({"type": "gated_delta_net", "d_model": 8, "num_heads": 2, **change})
    with pytest.raises(CheckpointError, match=message):
        export_gated_delta_net(ours, layout)


def test_only_this_layer_is_exported():
    with pytest.raises(TypeError, match="got Attention"):
        export_gated_delta_net(build_mixer({"type": "attention", "d_model": 8, "num_heads": 2}), "qwen3_5")
