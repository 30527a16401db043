"""Llama-style families: their configs and weight names, in both directions.

Llama, SmolLM, Mistral, Qwen2 and Qwen3 are one architecture with switches (grouped heads, biases, q/k norms,
windows, RoPE scaling), so one `ModelConfig` describes them all and the weight map is a renaming. GGUF files
add one permutation, see `gguf_weight_map`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from .config_reader import ConfigReader, SourceWeight, build_config
from .errors import CheckpointError
from .gated_delta_net import HYBRID_FAMILIES
from .gguf_files import GGUFFile

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# what a config.json means by leaving a key out (the defaults of the family's config class)
_COMMON_DEFAULTS: dict[str, Any] = {
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "head_dim": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}

# keys that scale RoPE by a fixed rule; `dynamic` and `longrope` change the angles of earlier tokens as the
# text grows
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


# fields of an attention layer for which a config.json has one value for all layers
_SHARED_FIELDS = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "qk_norm",
    "norm_eps",
    "qkv_bias",
    "o_bias",
)


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Turns the `config.json` of a Llama-style folder into a ModelConfig.

    Args:
        values: the parsed file.
        where: named in errors.

    Raises:
        CheckpointError: another model type, a missing or impossible value, or a feature that the backbone
            does not have.
    """
    family = values.get("model_type")
    if family in HYBRID_FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {family!r}, which is not read as a whole: the backbone lacks parts of "
            "its attention, norms or experts. Its Gated DeltaNet layers are read one by one by "
            "memzoo.models.checkpoints.gated_delta_net.load_gated_delta_net."
        )
    if family not in FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {family!r}. Of models with attention, {', '.join(FAMILIES)} (SmolLM is "
            "llama) are known; folders of mamba and mamba2 are read too."
        )
    reader = ConfigReader(values, where, {**_COMMON_DEFAULTS, **_FAMILY_DEFAULTS[family]})
    d_model = reader.positive("hidden_size")
    num_layers = reader.positive("num_hidden_layers")
    num_heads = reader.positive("num_attention_heads")
    num_kv_heads = reader.positive("num_key_value_heads", num_heads)
    head_dim = reader.positive("head_dim", d_model // num_heads)
    reader.require("hidden_act", "silu")
    reader.require("mlp_bias", False)
    max_positions = reader.positive("max_position_embeddings")
    rope_theta, rope_scaling = _rope_from_hf(reader, max_positions)
    bias = family == "qwen2" or (family in ("llama", "qwen3") and reader.boolean("attention_bias"))
    defaults = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "qk_norm": family == "qwen3",
        "norm_eps": reader.number("rms_norm_eps"),
        "qkv_bias": bias,
        "o_bias": bias and family != "qwen2",
    }
    return build_config(
        where,
        vocab_size=reader.positive("vocab_size"),
        d_model=d_model,
        layers=_layers(_windows_from_hf(reader, family, num_layers)),
        mixer_defaults=defaults,
        mlp={"type": "swiglu", "d_ff": reader.positive("intermediate_size")},
        norm_eps=reader.number("rms_norm_eps"),
        tie_embeddings=reader.boolean("tie_word_embeddings"),
        max_position_embeddings=max_positions,
        initializer_range=reader.number("initializer_range"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of the Llama-style family that computes the same function.

    Raises:
        CheckpointError: the model is not one of these families (the first obstacle is named).
    """
    attention = [_exportable(index, mixer) for index, mixer in enumerate(config.mixers)]
    shared = {key: attention[0][key] for key in _SHARED_FIELDS}
    for index, fields in enumerate(attention):
        for key, value in shared.items():
            if fields[key] != value:
                raise CheckpointError(
                    f"layer {index} has {key}={fields[key]!r}, layer 0 has {value!r}. "
                    "A Llama-style folder has one value."
                )
    if (
        config.norm != "rms"
        or any(mlp != config.mlps[0] for mlp in config.mlps)
        or config.mlps[0]["type"] != "swiglu"
    ):
        raise CheckpointError(
            "only models with RMSNorm and one SwiGLU MLP size can be exported as a Llama-style folder."
        )
    if shared["norm_eps"] != config.norm_eps and shared["qk_norm"]:
        raise CheckpointError(
            f"q/k norms have norm_eps {shared['norm_eps']}, the model {config.norm_eps}. "
            "A Llama-style folder has one value."
        )
    windows = [fields.get("window_size") for fields in attention]
    family = _family_of(shared, windows)
    values: dict[str, Any] = {
        "architectures": [
            {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
            + "ForCausalLM"
        ],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlps[0]["d_ff"],
        "num_hidden_layers": config.depth,
        "num_attention_heads": shared["num_heads"],
        "num_key_value_heads": shared["num_kv_heads"],
        "head_dim": shared["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings
        or _FAMILY_DEFAULTS[family]["max_position_embeddings"],
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": shared["rope_theta"],
        "rope_scaling": dict(shared["rope_scaling"]) if shared["rope_scaling"] else None,
    }
    if family == "qwen2" and shared["head_dim"] * shared["num_heads"] != config.d_model:
        raise CheckpointError("a Qwen2 folder needs d_model = num_heads * head_dim.")
    if family in ("llama", "qwen3"):
        values["attention_bias"] = shared["qkv_bias"]
    if family == "mistral":
        values["sliding_window"] = windows[0]
    if family in ("qwen2", "qwen3"):
        sizes = sorted({window for window in windows if window})
        values["use_sliding_window"] = bool(sizes)
        values["sliding_window"] = sizes[0] if sizes else None
        values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return values


def hf_weight_map(config: ModelConfig) -> dict[str, SourceWeight]:
    """Our names -> names in a Llama-style Hugging Face folder."""
    return {ours: SourceWeight(_hf_name(ours), shape) for ours, shape in expected_shapes(config).items()}


def gguf_weight_map(config: ModelConfig, architecture: str) -> dict[str, SourceWeight]:
    """Our names -> names in a GGUF file.

    Files of the architecture `llama` store the rows of the query and key projections interleaved, for the
    RoPE convention that turns neighbouring pairs; ours turns the two halves of a head. `deinterleave` undoes
    it.
    """
    weights = {}
    for ours, shape in expected_shapes(config).items():
        heads = 0
        if architecture == "llama" and (".q_proj." in ours or ".k_proj." in ours):
            attention = _exportable(0, config.mixers[0])
            heads = attention["num_heads"] if ".q_proj." in ours else attention["num_kv_heads"]
        weights[ours] = SourceWeight(_gguf_name(ours), shape, heads)
    return weights


def deinterleave(weight: Tensor, num_heads: int) -> Tensor:
    """Rows (heads, head_dim / 2, 2) -> (heads, 2, head_dim / 2) of a projection (heads * head_dim, ...)."""
    rows = weight.unflatten(0, (num_heads, weight.shape[0] // num_heads // 2, 2))
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a Llama-style model, in the order of the model.

    Raises:
        CheckpointError: a block holds something else than attention or windowed attention.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, config.d_model)}
    for index, (mixer, mlp) in enumerate(zip(config.mixers, config.mlps, strict=True)):
        fields = _exportable(index, mixer)
        head_dim = fields["head_dim"]
        width, kv_width = fields["num_heads"] * head_dim, fields["num_kv_heads"] * head_dim
        block = f"layers.{index}."
        shapes[block + "mixer_norm.weight"] = (config.d_model,)
        for name, rows in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
            shapes[f"{block}mixer.{name}.weight"] = (rows, config.d_model)
            if fields["qkv_bias"]:
                shapes[f"{block}mixer.{name}.bias"] = (rows,)
        shapes[block + "mixer.o_proj.weight"] = (config.d_model, width)
        if fields["o_bias"]:
            shapes[block + "mixer.o_proj.bias"] = (config.d_model,)
        if fields["qk_norm"]:
            shapes[block + "mixer.q_norm.weight"] = (head_dim,)
            shapes[block + "mixer.k_norm.weight"] = (head_dim,)
        shapes[block + "mlp_norm.weight"] = (config.d_model,)
        shapes[block + "mlp.gate_proj.weight"] = (mlp["d_ff"], config.d_model)
        shapes[block + "mlp.up_proj.weight"] = (mlp["d_ff"], config.d_model)
        shapes[block + "mlp.down_proj.weight"] = (config.d_model, mlp["d_ff"])
    shapes["norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads the ModelConfig out of the metadata of a GGUF file.

    Raises:
        CheckpointError: another architecture, a missing or impossible value, or a feature that the backbone
            does not have.
    """
    architecture = file.architecture
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(
            f"{file.path} has the architecture {architecture!r}; "
            "llama (with SmolLM and Mistral), qwen2 and qwen3 are read."
        )

    def positive(key: str, default: Any = ...) -> int:
        value = file.get(f"{architecture}.{key}", int, default)
        if not 1 <= value < 2**31:
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} is {value}, expected a positive number."
            )
        return value

    def number(key: str, default: Any = ...) -> float:
        value = file.get(f"{architecture}.{key}", float, default)
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} is {value}, expected a positive number."
            )
        return value

    d_model, num_heads = positive("embedding_length"), positive("attention.head_count")
    num_kv_heads = positive("attention.head_count_kv", num_heads)
    head_dim = positive(
        "attention.key_length", positive("rope.dimension_count", max(d_model // num_heads, 1))
    )
    if (
        positive("attention.value_length", head_dim) != head_dim
        or positive("rope.dimension_count", head_dim) != head_dim
    ):
        raise CheckpointError(
            f"{file.path}: keys, values and rotated width must have the same size, here {head_dim}."
        )
    if file.get(f"{architecture}.expert_count", int, 0):
        raise CheckpointError(f"{file.path} is a mixture of experts, which the backbone does not have.")
    if "rope_freqs.weight" in file.tensors:
        raise CheckpointError(
            f"{file.path} scales RoPE by a stored table (rope_freqs.weight, Llama 3.1 and later) without its "
            "rule. "
            "Read the Hugging Face folder of the model instead."
        )
    scaling = file.get(f"{architecture}.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(
            f"{file.path} has RoPE scaling {scaling!r}; from GGUF files none and linear are read. "
            "Read the Hugging Face folder instead."
        )
    rope_scaling = (
        {"rope_type": "linear", "factor": number("rope.scaling.factor")} if scaling == "linear" else None
    )
    num_layers = positive("block_count")
    if num_layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path} claims {num_layers} blocks, but holds {len(file.tensors)} tensors."
        )
    for key, heads in (("attention.head_count", num_heads), ("attention.head_count_kv", num_kv_heads)):
        if heads * head_dim > 2**24:
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} is {heads}, too many for heads of {head_dim}."
            )
    vocab_size = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    if vocab_size < 1 or file.get(f"{architecture}.vocab_size", int, vocab_size) != vocab_size:
        raise CheckpointError(
            f"{file.path}: token_embd.weight has {vocab_size} rows, which is not the vocabulary size of the "
            "metadata."
        )
    window = file.get(f"{architecture}.attention.sliding_window", int, 0) or None
    bias = "blk.0.attn_q.bias" in file.tensors
    defaults = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rope_theta": number("rope.freq_base", 10_000.0),
        "rope_scaling": rope_scaling,
        "qk_norm": architecture == "qwen3",
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "qkv_bias": bias,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
    }
    return build_config(
        str(file.path),
        vocab_size=vocab_size,
        d_model=d_model,
        layers=_layers([window] * num_layers),
        mixer_defaults=defaults,
        mlp={"type": "swiglu", "d_ff": positive("feed_forward_length")},
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        max_position_embeddings=positive("context_length"),
    )


def _rope_from_hf(reader: ConfigReader, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling rule: from `rope_theta` and `rope_scaling`, or from `rope_parameters`."""
    raw = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise reader.wrong("rope_parameters", raw, "one set of parameters for all layers")
    rules = {key: value for key, value in raw.items() if value is not None}
    theta = rules.pop("rope_theta", reader.get("rope_theta"))
    if (
        isinstance(theta, bool)
        or not isinstance(theta, (int, float))
        or not (math.isfinite(theta) and theta > 0)
    ):
        raise reader.wrong("rope_theta", theta, "a positive number")
    if rules.pop("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0)) != 1:
        raise reader.wrong("partial_rotary_factor", "not 1", "1: the backbone rotates whole heads")
    alias = rules.pop("type", "default")
    kind = rules.pop("rope_type", alias)
    if kind == "default":
        return float(theta), None
    if kind not in _ROPE_KEYS:
        hint = (
            " Its angles change with the length of the text, so no state could be kept."
            if kind in ("dynamic", "longrope")
            else ""
        )
        raise CheckpointError(
            f"{reader.where} has RoPE scaling {kind!r}; default, {', '.join(_ROPE_KEYS)} are supported.{hint}"
        )
    required, optional = _ROPE_KEYS[kind]
    if "original_max_position_embeddings" in required:
        outer = reader.get("original_max_position_embeddings")
        rules["original_max_position_embeddings"] = outer or rules.get(
            "original_max_position_embeddings", max_positions
        )
    if kind == "yarn" and "factor" not in rules:
        rules["factor"] = max_positions / rules["original_max_position_embeddings"]
    for key in required:
        if (
            isinstance(rules.get(key), bool)
            or not isinstance(rules.get(key), (int, float))
            or not 0 < rules[key] < math.inf
        ):
            raise CheckpointError(
                f"{reader.where}: RoPE scaling {kind!r} needs {key}, a positive number, got "
                f"{rules.get(key)!r}."
            )
    for key in rules:
        if key not in required + optional:
            raise CheckpointError(f"{reader.where}: RoPE scaling {kind!r} has the unknown key {key!r}.")
        if isinstance(rules[key], (str, list, Mapping)):
            raise CheckpointError(
                f"{reader.where}: RoPE scaling {kind!r} has {key}={rules[key]!r:.60}, expected a number."
            )
    return float(theta), {
        "rope_type": kind,
        **{key: rules[key] for key in required + optional if key in rules},
    }


def _windows_from_hf(reader: ConfigReader, family: str, num_layers: int) -> list[int | None]:
    """The window of each block, None for attention over the whole text."""
    if num_layers > 100_000:
        raise reader.wrong("num_hidden_layers", num_layers, "at most 100000")
    window = (
        reader.values["sliding_window"]
        if "sliding_window" in reader.values
        else reader.defaults["sliding_window"]
    )
    if (
        family == "llama"
        or window is None
        or (family != "mistral" and not reader.boolean("use_sliding_window"))
    ):
        return [None] * num_layers
    window = reader.positive("sliding_window")
    if family == "mistral":
        return [window] * num_layers
    kinds = reader.get("layer_types")
    if kinds is None:
        first = reader.get("max_window_layers")
        if type(first) is not int:
            raise reader.wrong("max_window_layers", first, "an integer")
        return [window if index >= first else None for index in range(num_layers)]
    names = {"full_attention": None, "sliding_attention": window}
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(not isinstance(kind, str) or kind not in names for kind in kinds)
    ):
        raise reader.wrong(
            "layer_types", kinds, f"{num_layers} entries, each full_attention or sliding_attention"
        )
    return [names[kind] for kind in kinds]


def _layers(windows: list[int | None]) -> list[dict[str, Any]]:
    return [
        {"type": "attention"} if window is None else {"type": "sliding_window", "window_size": window}
        for window in windows
    ]


def _exportable(index: int, mixer: Any) -> dict[str, Any]:
    """The fields of a mixer that a Llama-style family can express."""
    if mixer.type not in ("attention", "sliding_window"):
        raise CheckpointError(
            f"layer {index} is {mixer.type!r}. A Llama-style folder holds attention and sliding_window only; "
            "save the model with memzoo.save instead."
        )
    fields = mixer.to_dict()
    if fields["rope_theta"] is None:
        raise CheckpointError(f"layer {index} has no rotary positions, which every Llama-style family has.")
    for item in dataclasses.fields(mixer):
        known = item.name in (*_SHARED_FIELDS, "type", "d_model", "window_size", "num_sinks")
        if not known and fields[item.name] != item.default:
            raise CheckpointError(
                f"layer {index} has {item.name}={fields[item.name]!r}, which no Llama-style family has. "
                "Use save_pretrained."
            )
    if fields.get("num_sinks"):
        raise CheckpointError(
            f"layer {index} has {fields['num_sinks']} sinks, which no Llama-style family has. "
            "Use save_pretrained."
        )
    return fields


def _family_of(shared: Mapping[str, Any], windows: list[int | None]) -> str:
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise CheckpointError(
            f"the layers have windows of {sorted(sizes)} tokens. A Llama-style folder has one size."
        )
    biases = (shared["qkv_bias"], shared["o_bias"])
    if shared["qk_norm"]:
        if biases[0] != biases[1]:
            raise CheckpointError("a Qwen3 folder has biases on all four projections or on none.")
        return "qwen3"
    if biases == (True, False):
        return "qwen2"
    if not sizes and biases[0] == biases[1]:
        return "llama"
    if sizes and biases == (False, False) and None not in windows:
        return "mistral"
    raise CheckpointError(
        "no Llama-style family has this combination of biases and windows. Use save_pretrained."
    )


def _hf_name(ours: str) -> str:
    if ours == "lm_head.weight":
        return ours
    name = ours.replace(".mixer_norm.", ".input_layernorm.").replace(
        ".mlp_norm.", ".post_attention_layernorm."
    )
    return "model." + name.replace(".mixer.", ".self_attn.")


_GGUF_PARTS = {
    "mixer_norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.q_norm": "attn_q_norm",
    "mixer.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(ours: str) -> str:
    outer = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if ours in outer:
        return outer[ours]
    _, index, rest = ours.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_PARTS[part]}.{kind}"
