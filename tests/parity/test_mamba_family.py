"""Toy Mamba models of transformers against ours: logits, steps, weights and configs, in both directions."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import memzoo
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.folder import (
    export_mamba_folder,
    load_model,
    read_model_config,
    read_token_ids,
    read_weights,
)
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM, float32_parameter_names
from memzoo.models.hf import MemoryForCausalLM

from ..unit.models.damage import damaged_copies

VOCAB, LENGTH = 37, 14
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 5,
    "conv_kernel": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPS = {"num_heads": 8, "head_dim": 4, "n_groups": 2, "chunk_size": 4}

# name -> (class prefix, changes)
FAMILIES = {
    "mamba": ("Mamba", {}),
    "mamba, other switches": (
        "Mamba",
        {
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": False,
            "time_step_rank": 3,
            "expand": 3,
            "conv_kernel": 2,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "mamba2": ("Mamba2", {**GROUPS, "tie_word_embeddings": True}),
    "mamba2, other switches": (
        "Mamba2",
        {
            **GROUPS,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": (0.3, 0.9),
            "layer_norm_epsilon": 1e-3,
        },
    ),
}


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def source(request, tmp_path):
    """A toy model of transformers with random weights, and the folder it was saved in."""
    prefix, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_our_model_computes_the_same_function(source):
    theirs, folder = source
    ours = load_model(folder).eval()
    ids = tokens(2, LENGTH)
    expected = theirs(ids).logits
    out = ours(ids, return_state=True)
    assert (out.logits - expected).abs().max() <= 1e-4
    assert torch.equal(out.logits.argmax(-1), expected.argmax(-1))
    pieces, state = [], ours.init_state(2)
    for t in range(LENGTH):
        step = ours.step(ids[:, t], state)
        pieces.append(step.logits)
        state = step.state
    assert (torch.stack(pieces, 1) - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_steps_after_a_prompt(source):
    theirs, folder = source
    ours = load_model(folder).eval()
    ids = tokens(2, LENGTH)
    prompt = theirs(ids[:, :6], use_cache=True)
    out = ours(ids[:, :6], return_state=True)
    cache, state = prompt.cache_params, out.state
    # theirs forget to clamp the step sizes of single tokens: then the whole sequence is the measure
    is_limited = "time_step_limit" in theirs.config.to_diff_dict()
    whole = theirs(ids).logits
    for t in range(6, LENGTH):
        expected = theirs(ids[:, t : t + 1], cache_params=cache, use_cache=True)
        cache = expected.cache_params
        step = ours.step(ids[:, t], state)
        state = step.state
        assert (step.logits - (whole[:, t] if is_limited else expected.logits[:, 0])).abs().max() <= 1e-4


@torch.no_grad()
def test_transformers_loads_what_we_export(source, tmp_path):
    theirs, folder = source
    export_mamba_folder(load_model(folder), tmp_path / "export", token_ids=read_token_ids(folder))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    ids = tokens(2, LENGTH)
    # not to the bit: they cut Mamba-2 into chunks of a size that changes no other number
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["transformers", "state_spaces"])
def test_weights_and_config_survive_both_directions_bit_for_bit(source, tmp_path, layout):
    _, folder = source
    config = read_model_config(folder)
    if layout == "state_spaces" and config.norm_eps != 1e-5:
        with pytest.raises(CheckpointError, match="epsilon of 1e-5 only"):
            export_mamba_folder(load_model(folder), tmp_path / "export", layout=layout)
        return
    export_mamba_folder(load_model(folder), tmp_path / "export", layout=layout)
    again = read_model_config(tmp_path / "export")
    if layout == "transformers":
        assert again == config
    else:  # there the output projections start divided by the root of the depth
        assert {x.num_residuals for x in again.mixers} == {2}
        assert read_model_config(tmp_path / "export").mixers[0].d_state == config.mixers[0].d_state
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    if layout == "state_spaces":
        after["backbone.embeddings.weight"] = after.pop("backbone.embedding.weight")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, reread = (read_weights(place) for place in (folder, tmp_path / "export"))
    assert ours.keys() == reread.keys() == MemoryLM(config, device="meta").state_dict().keys()
    assert all(torch.equal(ours[name], reread[name]) for name in ours)


def test_the_depth_in_the_first_weights_is_read_but_not_written(tmp_path):
    """transformers divides weights that it loads by the root of the depth where the config asks for it."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(**SIZES, rescale_prenorm_residual=True)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    assert {x.num_residuals for x in model.config.mixers} == {2}
    export_mamba_folder(model, tmp_path / "export")
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path / "export")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    name = "backbone.layers.1.mixer.out_proj.weight"
    assert torch.equal(again.state_dict()[name], stored[name])


def test_bfloat16_folders_keep_their_dtype(tmp_path):
    torch.manual_seed(0)
    transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert bool(torch.isfinite(model(tokens(1, 5)).logits).all())
    assert load_model(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize("reader", ["memzoo", "transformers"])
def test_half_precision_leaves_rates_and_steps_alone(tmp_path, reader):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=9, d_model=16, layers=[{"type": "mamba1"}, {"type": "mamba2", "head_dim": 4}]
    )
    model = MemoryLM(config)
    memzoo.save(model, tmp_path / "own")
    if reader == "memzoo":
        half = load_model(tmp_path / "own", dtype=torch.bfloat16)
    else:
        half = MemoryForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.bfloat16).model
    kept = float32_parameter_names(model)
    assert {name.removeprefix("layers.") for name in kept} == {
        "0.mixer.A_log", "0.mixer.D", "0.mixer.dt_proj.bias", "1.mixer.A_log", "1.mixer.D", "1.mixer.dt_bias"
    }  # fmt: skip
    for name, stored in model.state_dict().items():
        found = half.state_dict()[name]
        assert found.dtype == (torch.float32 if name in kept else torch.bfloat16), name
        assert torch.equal(found, stored.to(found.dtype)), name
    assert half(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


OLD_CONFIG = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def write_original(folder: Path, changes: dict[str, object]) -> MemoryLM:
    """A folder as the original code writes it, but for the format of its weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40,
        d_model=16,
        layers={"type": "mamba1"},
        num_layers=2,
        tie_embeddings=True,
        residual_in_fp32=True,
    )
    model = MemoryLM(config)
    export_mamba_folder(model, folder, layout="state_spaces")
    weights = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"].clone()
    (folder / "memzoo_manifest.json").unlink()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**OLD_CONFIG, **changes}))
    return model


def test_folders_of_the_original_code_with_an_old_config(tmp_path):
    model = write_original(tmp_path, {})
    loaded = load_model(tmp_path)
    assert loaded.config.tie_embeddings
    assert loaded.config.mixers[0].num_residuals == 2
    ids = tokens(2, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(load_model(tmp_path).blocks[1].mixer.A_log, model.blocks[1].mixer.A_log)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 48}, "the config implies .48, 16."),
        ({"n_layer": 3}, r"backbone\.layers\.2.* is missing"),
        ({"n_layer": 0}, "n_layer=0, expected a positive integer"),
        ({"d_intermediate": 64}, "d_intermediate=64, expected 0: blocks without MLP"),
        ({"attn_layer_idx": [1]}, "no layers of attention"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"tie_embeddings": False, "vocab_size": 40}, None),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer='Mamba3'. Mamba1 and Mamba2 are read"),
        ({"ssm_cfg": {"d_stat": 3}}, "unknown key 'd_stat'. Did you mean 'd_state'"),
        ({"ssm_cfg": {"d_state": "3"}}, "d_state must be an integer"),
        ({"ssm_cfg": {"bias": "no"}}, "use_bias must be true or false"),
        ({"ssm_cfg": {"dt_min": "low"}}, "dt_min must be a number, got 'low'"),
        ({"ssm_cfg": [1]}, "expected a mapping"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm=False"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 5}}, "head_dim must divide"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": "x"}}, "expected two numbers"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0, 10**400]}}, "expected two numbers"),
        ({"ssm_cfg": {"dt_max": 10**400}}, "dt_min 0.001, dt_max 1000"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 4}}, r"mixer\.dt_bias' is missing"),
    ],
)
def test_what_the_original_config_cannot_mean_is_named(tmp_path, changes, message):
    write_original(tmp_path, changes)
    if message is None:
        assert load_model(tmp_path).lm_head is not None
        return
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_heads": 4}, "num_heads=4, expected 32 channels / head_dim 4"),
        ({"n_groups": 3}, "3 groups for 8 heads"),
        ({"time_step_limit": [0.0]}, "expected two numbers"),
        ({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, None),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"expand": 0}, "expand=0"),
        ({"use_bias": 1}, "use_bias=1, expected true or false"),
        ({"time_step_max": 10**400}, "time_step_max=1000.*, expected a positive number"),
        ({"state_size": 6}, "the config implies"),
    ],
)
def test_what_the_config_of_transformers_cannot_mean_is_named(tmp_path, changes, message):
    torch.manual_seed(0)
    transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**SIZES, **GROUPS})).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    if message is None:
        assert load_model(tmp_path).config.mixers[0].dt_limit is None
        return
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_pickle_is_refused_with_the_way_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 64)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle file.*Convert it to safetensors"
    ):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"not a GGUF file.*Give its folder, '{tmp_path}'"):
        load_model(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("layout", ["transformers", "state_spaces"])
@pytest.mark.parametrize("mixer", [{"type": "mamba1", "d_state": 5}, {"type": "mamba2", "head_dim": 4}])
def test_damaged_configs(tmp_path, mixer, layout):
    """Each is a CheckpointError that names the file, or a load with the right names and shapes."""
    config = ModelConfig(vocab_size=24, d_model=8, layers=[mixer], tie_embeddings=True)
    export_mamba_folder(MemoryLM(config), tmp_path, layout=layout)
    (tmp_path / "memzoo_manifest.json").unlink()
    place = tmp_path / "config.json"

    def specification():
        return {name: tuple(x.shape) for name, x in read_weights(tmp_path).items()}

    content, expected = place.read_bytes(), specification()
    outcomes = {"refused": 0, "loaded": 0}
    for index, broken in enumerate(damaged_copies(content, 125, seed=3)):
        place.write_bytes(broken)
        try:
            found = specification()
        except CheckpointError as error:
            outcomes["refused"] += 1
            described = str(error)
            if str(tmp_path) not in described:
                pytest.fail(f"copy {index}: the error does not name the file: {described}")
        else:
            outcomes["loaded"] += 1
            assert found == expected, f"copy {index}"
    assert outcomes["refused"] > 30
    assert outcomes["loaded"] > 5


def test_sizes_that_no_tensor_has_are_named(tmp_path):
    write_original(tmp_path, {"d_model": 2**31 - 1, "ssm_cfg": {"expand": 2**31 - 1, "dt_rank": 1}})
    with pytest.raises(CheckpointError, match="sizes that no tensor has"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ([{"type": "mamba1"}, {"type": "base_conv"}], {}, "layer 1 is 'base_conv'.* with memzoo.save"),
        ([{"type": "mamba1"}, {"type": "mamba1", "d_state": 3}], {}, "layer 1 differs from layer 0"),
        ([{"type": "mamba1"}], {"mlp": {"type": "swiglu", "d_ff": 6}}, "without MLPs"),
        ([{"type": "mamba1"}], {"norm": "layer"}, "RMSNorm"),
        ([{"type": "mamba2", "head_dim": 4, "norm_before_gate": True}], {}, "before the gate"),
        ([{"type": "mamba2", "head_dim": 4, "norm_eps": 1e-3}], {}, "norm_eps 0.001"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, layers, changes, message):
    config = ModelConfig(**{"vocab_size": 7, "d_model": 8, "layers": layers, **changes})
    with pytest.raises(CheckpointError, match=message):
        export_mamba_folder(MemoryLM(config), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_unknown_layout_is_named(tmp_path):
    config = ModelConfig(vocab_size=7, d_model=8, layers=[{"type": "mamba1"}])
    with pytest.raises(
        CheckpointError, match=r"layout 'state-spaces' is unknown\. Did you mean 'state_spaces'"
    ):
        export_mamba_folder(MemoryLM(config), tmp_path / "export", layout="state-spaces")
