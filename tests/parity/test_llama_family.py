"""Toy models of transformers against ours: logits, greedy tokens, weights and configs, in both directions."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.folder import (
    export_llama_folder,
    load_model,
    read_model_config,
    read_token_ids,
    read_weights,
)
from memzoo.models.decoder import MemoryLM

VOCAB, LENGTH = 53, 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_ALL = {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3}

# name -> (class prefix, changes)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama wide heads and biases": ("Llama", {"head_dim": 10, "attention_bias": True}),
    "llama linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("Llama", {"rope_parameters": YARN}),
    "yarn rope, all knobs": (
        "Llama",
        {"rope_parameters": YARN_ALL},
    ),
    "yarn rope, not truncated": (
        "Llama",
        {"rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.25}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 biases, yarn": ("Qwen3", {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN}),
    "qwen3 windows": (
        "Qwen3",
        {
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def source(request, tmp_path):
    """A toy model of transformers with random weights, and the folder it was saved in."""
    prefix, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start at one and zero
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model: MemoryLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Continues ids (B, T) by `count` tokens, decoding with the carried state."""
    out = model(ids, return_state=True, last_only=True)
    chosen = [out.logits.argmax(-1)]
    for _ in range(count - 1):
        out = model.step(chosen[-1], out.state, donate=True)
        chosen.append(out.logits.argmax(-1))
    return torch.stack(chosen, 1)


@torch.no_grad()
def test_our_model_computes_the_same_function(source):
    theirs, folder = source
    ours = load_model(folder).eval()
    ids = tokens(2, LENGTH)
    expected = theirs(ids).logits
    actual = ours(ids).logits
    assert (actual - expected).abs().max() <= 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    prompt = ids[:, :5]
    continued = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    assert torch.equal(greedy(ours, prompt, 64), continued[:, 5:])


@torch.no_grad()
def test_transformers_loads_what_we_export(source, tmp_path):
    theirs, folder = source
    ours = load_model(folder)
    export_llama_folder(ours, tmp_path / "export", token_ids=read_token_ids(folder))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again).__name__ in (
        type(theirs).__name__,
        "LlamaForCausalLM",
    )  # Mistral without window is Llama
    ids = tokens(2, LENGTH)
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_weights_and_config_survive_both_directions_bit_for_bit(source, tmp_path):
    _, folder = source
    config = read_model_config(folder)
    export_llama_folder(load_model(folder), tmp_path / "export")
    assert read_model_config(tmp_path / "export") == config
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "export" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = read_weights(folder, config)
    assert ours.keys() == MemoryLM(config, device="meta").state_dict().keys()


def test_sharded_folders(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = tokens(1, 9)
    with torch.no_grad():
        assert (load_model(tmp_path)(ids).logits - theirs(ids).logits).abs().max() <= 1e-4


def test_bfloat16_folders_keep_their_dtype(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).embed_tokens.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": 0}, "hidden_size=0, expected a positive integer"),
        ({"hidden_size": "24"}, "hidden_size='24'"),
        ({"num_attention_heads": 5, "head_dim": 8}, "num_heads must be a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*angles change"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "su"}}, "'su'.*linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "unknown key 'x'"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3.* is missing"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2.* belongs to no part"),
        ({"intermediate_size": 37}, "has shape .36, 24., the config implies .37, 24."),
        ({"vocab_size": 54}, "embed_tokens.*the config implies .54, 24."),
        ({"tie_word_embeddings": True}, r"lm_head\.weight that differs"),
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
    ],
)
def test_another_model_is_named(tmp_path, changes, message):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters", None)
    assert rope == {"rope_theta": 10000.0, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ([{"type": "sliding_window", "window_size": 3, "num_sinks": 2}], {}, "2 sinks"),
        ([{"type": "sliding_window", "window_size": w} for w in (3, 4)], {}, r"windows of \[3, 4\]"),
        ([{"type": "attention"}, {"type": "sliding_window", "window_size": 3}], {}, "no Llama-style family"),
        ([{"type": "attention"}, {"type": "attention", "rope_theta": 5.0}], {}, "rope_theta=5.0"),
        ([{"type": "attention"}], {"norm": "layer"}, "RMSNorm"),
        ([{"type": "attention"}], {"mlp": {"type": "none"}}, "SwiGLU"),
        ([{"type": "attention", "rope_theta": None}], {}, "rotary positions"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, layers, changes, message):
    from memzoo.models.config import ModelConfig

    values = {"vocab_size": 7, "d_model": 8, "layers": layers, "mlp": {"type": "swiglu", "d_ff": 6}}
    config = ModelConfig(**{**values, "mixer_defaults": {"num_heads": 2}, **changes})
    with pytest.raises(CheckpointError, match=message):
        export_llama_folder(MemoryLM(config), tmp_path / "export")
    assert not (tmp_path / "export").exists()
