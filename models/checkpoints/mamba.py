"""Mamba and Mamba-2 checkpoints: of transformers, and of the original code (state-spaces).

Both name the weights alike but for the embedding. Their configs differ: transformers writes a `model_type`,
the original code the arguments of its layers (`ssm_cfg`) and the vocabulary before it is padded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ...layers.contract import suggest
from ...layers.parts.state_space import is_number
from ..config import ModelConfig
from ..decoder import MemoryLM
from .config_reader import ConfigReader, SourceWeight, build_config
from .errors import CheckpointError

MAMBA_FAMILIES = ("mamba", "mamba2")
LAYOUTS = ("transformers", "state_spaces")

_EMBEDDINGS = {"transformers": "backbone.embeddings.weight", "state_spaces": "backbone.embedding.weight"}

# what a config.json of transformers means by leaving a key out
_COMMON_DEFAULTS: dict[str, Any] = {
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-5,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": False,
    "rms_norm": True,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "tie_word_embeddings": False,
    },
}

# our field -> key of transformers, in both directions; the first group decides what the model computes
_HF_NUMBERS = {"d_state": "state_size", "conv_size": "conv_kernel", "expand": "expand"}
_HF_BOOLEANS = {"use_bias": "use_bias", "use_conv_bias": "use_conv_bias"}
_HF_STEPS = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_floor": "time_step_floor"}

# our field -> argument of the original layers
_SSM_COMMON = {
    "d_state": "d_state",
    "conv_size": "d_conv",
    "expand": "expand",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_floor": "dt_init_floor",
}
_SSM_FIELDS = {
    "mamba1": {**_SSM_COMMON, "dt_rank": "dt_rank"},
    "mamba2": {
        **_SSM_COMMON,
        "head_dim": "headdim",
        "num_groups": "ngroups",
        "rate_range": "A_init_range",
        "dt_limit": "dt_limit",
        "norm_before_gate": "norm_before_gate",
    },
}
# arguments that change nothing here: initialisation, kernels and chunks of the original code
_SSM_IGNORED = (
    "chunk_size",
    "conv_init",
    "dt_init",
    "dt_scale",
    "layer",
    "use_fast_path",
    "use_mem_eff_path",
)
# arguments of which the layers know one value only
_SSM_FIXED = {"rmsnorm": True, "D_has_hdim": False, "d_ssm": None}


def is_mamba(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of one of these models."""
    family = values.get("model_type")
    return family in MAMBA_FAMILIES or (family is None and "n_layer" in values and "d_model" in values)


def mamba_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Turns the `config.json` of a Mamba or Mamba-2 folder into a ModelConfig.

    Args:
        values: the parsed file, of transformers or of the original code.
        where: named in errors.

    Raises:
        CheckpointError: a missing or impossible value, or a feature that the layers do not have.
    """
    if values.get("model_type") is None:
        return _from_state_spaces(values, where)
    return _from_transformers(values, where)


def mamba_config_values(config: ModelConfig, layout: str) -> dict[str, Any]:
    """The content of the `config.json` that describes a model to other libraries.

    Args:
        config: a pure stack of `mamba1` or of `mamba2`.
        layout: one of `LAYOUTS`.

    Raises:
        CheckpointError: the layout cannot express the model; the obstacle is named.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is unknown. {suggest(str(layout), LAYOUTS)}")
    mixer = _exportable(config)
    return _to_transformers(config, mixer) if layout == "transformers" else _to_state_spaces(config, mixer)


def mamba_weight_map(
    config: ModelConfig,
    names: Collection[str] = (),
    *,
    layout: str = "transformers",
    where: str = "the model",
) -> dict[str, SourceWeight]:
    """Our names -> names in a Mamba folder.

    Args:
        config: of the model.
        names: the names that a folder holds, which tell its layout.
        layout: used where `names` does not tell.
        where: named in errors.

    Raises:
        CheckpointError: sizes that no tensor has.
    """
    embedding = next((name for name in _EMBEDDINGS.values() if name in names), _EMBEDDINGS[layout])
    try:
        model = MemoryLM(config, device="meta")
    except (OverflowError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{where} has sizes that no tensor has ({error}).") from error
    weights = {}
    for ours, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        is_convolution = ours.endswith(".conv1d.weight")
        if is_convolution:
            shape = (shape[0], 1, shape[1])
        name = {"embed_tokens.weight": embedding, "norm.weight": "backbone.norm_f.weight"}.get(ours, ours)
        if ours.startswith("layers."):
            name = "backbone." + ours.replace(".mixer_norm.", ".norm.")
        weights[ours] = SourceWeight(name, shape, has_middle_axis=is_convolution)
    return weights


def _from_transformers(values: Mapping[str, Any], where: str) -> ModelConfig:
    family = values["model_type"]
    reader = ConfigReader(values, where, {**_COMMON_DEFAULTS, **_FAMILY_DEFAULTS[family]})
    reader.require("hidden_act", "silu")
    reader.require("rms_norm", True)
    d_model, num_layers = reader.positive("hidden_size"), reader.positive("num_hidden_layers")
    fields: dict[str, Any] = {ours: reader.positive(theirs) for ours, theirs in _HF_NUMBERS.items()}
    fields |= {ours: reader.boolean(theirs) for ours, theirs in _HF_BOOLEANS.items()}
    fields |= {ours: reader.number(theirs) for ours, theirs in _HF_STEPS.items()}
    channels = fields["expand"] * d_model
    if reader.get("intermediate_size", channels) != channels:
        raise reader.wrong("intermediate_size", reader.get("intermediate_size"), "expand * hidden_size")
    if family == "mamba":
        rank = reader.get("time_step_rank", "auto")
        fields["dt_rank"] = None if rank == "auto" else reader.positive("time_step_rank")
    else:
        fields |= {"head_dim": reader.positive("head_dim"), "num_groups": reader.positive("n_groups")}
        if reader.positive("num_heads") * fields["head_dim"] != channels:
            raise reader.wrong(
                "num_heads", reader.get("num_heads"), f"{channels} channels / head_dim {fields['head_dim']}"
            )
        fields["dt_limit"] = _limit(reader, reader.get("time_step_limit"))
        fields["norm_eps"] = reader.number("layer_norm_epsilon")
    fields["num_residuals"] = num_layers if reader.boolean("rescale_prenorm_residual") else 1
    return build_config(
        where,
        vocab_size=reader.positive("vocab_size"),
        d_model=d_model,
        layers={"type": "mamba1" if family == "mamba" else "mamba2"},
        num_layers=num_layers,
        mixer_defaults=fields,
        norm_eps=reader.number("layer_norm_epsilon"),
        tie_embeddings=reader.boolean("tie_word_embeddings"),
        initializer_range=reader.number("initializer_range"),
        residual_in_fp32=reader.boolean("residual_in_fp32"),
    )


def _from_state_spaces(values: Mapping[str, Any], where: str) -> ModelConfig:
    defaults = {
        "pad_vocab_size_multiple": 8,
        "rms_norm": True,
        "residual_in_fp32": True,
        "tie_embeddings": True,
        "d_intermediate": 0,
    }
    reader = ConfigReader(values, where, defaults)
    reader.require("rms_norm", True)
    if reader.get("d_intermediate") != 0:
        raise reader.wrong("d_intermediate", reader.get("d_intermediate"), "0: blocks without MLP")
    if reader.get("attn_layer_idx"):
        raise reader.wrong("attn_layer_idx", reader.get("attn_layer_idx"), "no layers of attention")
    arguments = reader.get("ssm_cfg", {})
    if not isinstance(arguments, Mapping):
        raise reader.wrong("ssm_cfg", arguments, "a mapping")
    layer = arguments.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise CheckpointError(f"{where}: ssm_cfg has layer={layer!r:.80}. Mamba1 and Mamba2 are read.")
    layer = layer.lower()
    known = _SSM_FIELDS[layer]
    for key, value in arguments.items():
        if key in _SSM_FIXED and value == _SSM_FIXED[key]:
            continue
        if key in _SSM_FIXED:
            raise CheckpointError(f"{where}: ssm_cfg has {key}={value!r:.80}, which the layer does not have.")
        if key not in known.values() and key not in _SSM_IGNORED:
            raise CheckpointError(
                f"{where}: ssm_cfg has the unknown key {key!r}. {suggest(str(key), known.values())}"
            )
    fields = {ours: arguments[theirs] for ours, theirs in known.items() if theirs in arguments}
    if fields.get("dt_rank") == "auto":
        del fields["dt_rank"]
    if "dt_limit" in fields:
        fields["dt_limit"] = _limit(reader, fields["dt_limit"])
    num_layers, multiple = reader.positive("n_layer"), reader.positive("pad_vocab_size_multiple")
    return build_config(
        where,
        vocab_size=-(-reader.positive("vocab_size") // multiple) * multiple,
        d_model=reader.positive("d_model"),
        layers={"type": layer},
        num_layers=num_layers,
        mixer_defaults={**fields, "num_residuals": num_layers},
        norm_eps=1e-5,
        tie_embeddings=reader.boolean("tie_embeddings"),
        residual_in_fp32=reader.boolean("residual_in_fp32"),
    )


def _limit(reader: ConfigReader, value: Any) -> tuple[float, float] | None:
    """The range of the step sizes; transformers writes an infinite end as {"__float__": "Infinity"}."""
    if value is None:
        return None
    ends: list[Any] = [end.get("__float__") if isinstance(end, Mapping) else end for end in _pair(value)]
    ends = [math.inf if end in ("Infinity", "inf") else end for end in ends]
    if len(ends) != 2 or not all(is_number(end) for end in ends):
        raise reader.wrong("time_step_limit", value, "two numbers")
    low, high = float(ends[0]), float(ends[1])
    return None if (low, high) == (0.0, math.inf) else (low, high)


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _exportable(config: ModelConfig) -> dict[str, Any]:
    """The fields of the one mixer of a pure stack, as plain data."""
    first = config.mixers[0]
    for index, mixer in enumerate(config.mixers):
        if mixer.type not in ("mamba1", "mamba2"):
            raise CheckpointError(
                f"layer {index} is {mixer.type!r}. A Mamba folder holds mamba1 or mamba2 only; save the "
                "model with memzoo.save instead."
            )
        if mixer != first:
            raise CheckpointError(
                f"layer {index} differs from layer 0. A Mamba folder has layers of one kind."
            )
    if config.norm != "rms" or any(mlp["type"] != "none" for mlp in config.mlps):
        raise CheckpointError("only models with RMSNorm and without MLPs can be exported as a Mamba folder.")
    return first.to_dict()


def _to_transformers(config: ModelConfig, mixer: Mapping[str, Any]) -> dict[str, Any]:
    is_first = mixer["type"] == "mamba1"
    values = {
        "architectures": ["MambaForCausalLM" if is_first else "Mamba2ForCausalLM"],
        "model_type": "mamba" if is_first else "mamba2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.depth,
        **{theirs: mixer[ours] for ours, theirs in {**_HF_NUMBERS, **_HF_BOOLEANS, **_HF_STEPS}.items()},
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "residual_in_fp32": config.residual_in_fp32,
        # acts on fresh weights only, but transformers scales loaded ones again where it is true
        "rescale_prenorm_residual": False,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if is_first:
        values |= {"intermediate_size": mixer["expand"] * config.d_model, "time_step_rank": mixer["dt_rank"]}
        return values
    if mixer["norm_before_gate"]:
        raise CheckpointError("transformers has no Mamba-2 that normalises before the gate.")
    if mixer["norm_eps"] != config.norm_eps:
        raise CheckpointError(
            f"the layers have norm_eps {mixer['norm_eps']}, the model {config.norm_eps}. transformers has "
            "one value."
        )
    values |= {
        "num_heads": mixer["expand"] * config.d_model // mixer["head_dim"],
        "head_dim": mixer["head_dim"],
        "n_groups": mixer["num_groups"],
    }
    if mixer["dt_limit"] is not None:
        values["time_step_limit"] = list(mixer["dt_limit"])
    return values


def _to_state_spaces(config: ModelConfig, mixer: Mapping[str, Any]) -> dict[str, Any]:
    if config.norm_eps != 1e-5 or mixer.get("norm_eps", 1e-5) != 1e-5:
        raise CheckpointError("the original code of Mamba has norms with an epsilon of 1e-5 only.")
    layer = mixer["type"]
    arguments = {
        theirs: mixer[ours] for ours, theirs in _SSM_FIELDS[layer].items() if mixer[ours] is not None
    }
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.depth,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer.capitalize(), **arguments},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }
