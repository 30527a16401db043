"""The Gated DeltaNet layers of transformers (Qwen3-Next, Qwen3.5, Olmo Hybrid), one layer at a time.

All compute what `gated_delta_net` computes; they differ in names, and in which projections share a matrix:

    qwen3_next                one matrix for q, k, v and the gate, one for beta and the decay; within both the
                              rows of a key head lie together
    qwen3_5                   one matrix for q, k and v, the others apart
    olmo_hybrid               every projection apart, one convolution
    flash_linear_attention    every projection and every convolution apart; so are files of Olmo Hybrid

The rest of these models (gated attention, norms around one, experts) is not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...layers.contract import suggest
from ...layers.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionConfig
from ...layers.registry import mixer_config
from ..decoder import MemoryLM, parameter_tags, restore_parameter_tags
from .config_reader import ConfigReader, SourceWeight, build_config, check_names
from .errors import CheckpointError

# Dimensions: C taps of the convolution

HYBRID_FAMILIES = ("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")

_Q, _K, _V, _GATE = "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate.proj.weight"
_BETA, _DECAY, _OUT, _NORM = "beta.proj.weight", "decay.proj.weight", "o_proj.weight", "o_norm.weight"
_CONVOLUTION = "conv.weight"
# our one convolution, in the parts that some layouts keep apart
_CONVOLUTIONS = ("conv.q", "conv.k", "conv.v")
_CONVOLUTION_NAMES = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")

_RATES = {"A_log": ("decay.A_log",), "dt_bias": ("decay.dt_bias",)}
_QWEN = {**_RATES, "conv1d.weight": _CONVOLUTIONS, "norm.weight": (_NORM,), "out_proj.weight": (_OUT,)}
_APART = {
    **_RATES,
    "q_proj.weight": (_Q,),
    "k_proj.weight": (_K,),
    "v_proj.weight": (_V,),
    "g_proj.weight": (_GATE,),
    "b_proj.weight": (_BETA,),
    "a_proj.weight": (_DECAY,),
    "o_norm.weight": (_NORM,),
    "o_proj.weight": (_OUT,),
}
# layout -> name there -> our parts, whose rows it holds one after the other
_LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen3_next": {
        **_QWEN,
        "in_proj_qkvz.weight": (_Q, _K, _V, _GATE),
        "in_proj_ba.weight": (_BETA, _DECAY),
    },
    "qwen3_5": {
        **_QWEN,
        "in_proj_qkv.weight": (_Q, _K, _V),
        "in_proj_z.weight": (_GATE,),
        "in_proj_b.weight": (_BETA,),
        "in_proj_a.weight": (_DECAY,),
    },
    "olmo_hybrid": {**_APART, "conv1d.weight": _CONVOLUTIONS},
    "flash_linear_attention": {
        **_APART,
        **{theirs: (ours,) for theirs, ours in zip(_CONVOLUTION_NAMES, _CONVOLUTIONS, strict=True)},
    },
}
LAYOUTS = tuple(_LAYOUTS)
# names whose rows are grouped by key head first, by part within each
_BY_KEY_HEAD = ("in_proj_qkvz.weight", "in_proj_ba.weight")

_APART_LAYOUTS = ("olmo_hybrid", "flash_linear_attention")
_APART_EPS = 1e-5  # of their norm, whatever `rms_norm_eps` the rest of the model has

_NUMBERS = {
    "d_model": "hidden_size",
    "num_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "head_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_size": "linear_conv_kernel_dim",
}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_gated_delta_net(
    weights: Mapping[str, Tensor], values: Mapping[str, Any], *, prefix: str = ""
) -> GatedLinearAttention:
    """Builds the mixer that computes what a Gated DeltaNet layer of transformers computes.

    Args:
        weights: its weights in any of `LAYOUTS`, which the names tell; other weights may lie beside them
            where there is a prefix. Dtypes are kept.
        values: the parsed `config.json` of its model, or the `text_config` inside.
        prefix: what the names of the layer begin with, such as "model.layers.0.linear_attn.".

    Returns:
        A `gated_delta_net` with weights of its own.

    Raises:
        CheckpointError: a weight is missing, of no use, or of another shape or kind than the config implies;
            or a value of the config is missing or impossible.
        TypeError: `weights` or `values` is no mapping.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must map names to tensors, got {type(weights).__name__}. Give layer.state_dict(), or "
            "what safetensors.torch.load_file returns."
        )
    given = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    where = f"the layer {prefix!r}" if prefix else "the layer"
    layout = _layout_of([name.removeprefix(prefix) for name in given], where)
    config = gated_delta_net_config(values, layout)
    layer = _on_meta(config)
    if layout == "flash_linear_attention":
        given |= _cut_anew(given, [prefix + name for name in _CONVOLUTION_NAMES], layer.widths)
    check_names(
        where,
        _weight_map(layer, layout, prefix),
        {name: tuple(tensor.shape) for name, tensor in given.items()},
    )
    parts: dict[str, Tensor] = {}
    ours = _part_shapes(layer)
    for theirs, names in _LAYOUTS[layout].items():
        tensor = given[prefix + theirs].detach()
        if tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{where}: {prefix + theirs!r} has dtype {tensor.dtype} and layout {tensor.layout}, expected "
                f"a dense tensor of {', '.join(map(str, _FLOATS))}."
            )
        if names[0] in _CONVOLUTIONS:
            tensor = tensor.squeeze(1)  # (channels, C)
        rows = [ours[name][0] for name in names]
        parts.update(zip(names, _split(tensor, rows, _groups(config, theirs)), strict=True))
    convolutions = [parts.pop(name) for name in _CONVOLUTIONS]
    tags = parameter_tags(layer)
    layer.load_state_dict(
        {_CONVOLUTION: torch.cat(convolutions), **{name: part.clone() for name, part in parts.items()}},
        assign=True,
    )
    restore_parameter_tags(layer, tags)
    return layer


def export_gated_delta_net(
    layer: GatedLinearAttention, layout: str, *, prefix: str = ""
) -> dict[str, Tensor]:
    """The weights of a `gated_delta_net` under the names of another library.

    Args:
        layer: with one query head per key head.
        layout: one of `LAYOUTS`.
        prefix: what the names shall begin with.

    Returns:
        Copies, in the dtypes of the layer: what the layer class of transformers loads.

    Raises:
        CheckpointError: the layout cannot express the layer; the obstacle is named.
        TypeError: another kind of layer.
    """
    if not isinstance(layer, GatedLinearAttention):
        raise TypeError(f"layer must be a GatedLinearAttention, got {type(layer).__name__}.")
    gated_delta_net_values(layer.config, layout)
    parts = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    parts.update(zip(_CONVOLUTIONS, parts.pop(_CONVOLUTION).split(layer.widths), strict=True))
    weights = {}
    for theirs, names in _LAYOUTS[layout].items():
        tensor = _join([parts[name] for name in names], _groups(layer.config, theirs))
        weights[prefix + theirs] = tensor.unsqueeze(1) if names[0] in _CONVOLUTIONS else tensor
    return weights


def gated_delta_net_config(
    values: Mapping[str, Any], layout: str, where: str = "the config"
) -> GatedLinearAttentionConfig:
    """The mixer that a `config.json` of transformers describes.

    Args:
        values: the parsed file, or the `text_config` inside.
        layout: one of `LAYOUTS`.
        where: named in errors.

    Raises:
        CheckpointError: a missing or impossible value, or an activation that the layer does not have.
        TypeError: `values` is no mapping.
    """
    _check_layout(layout)
    if not isinstance(values, Mapping):
        raise TypeError(
            f"values must be the parsed config.json, got {type(values).__name__}. Give config.to_dict() of a "
            "config of transformers."
        )
    inner = values.get("text_config", values)
    reader = ConfigReader(
        inner if isinstance(inner, Mapping) else values,
        where,
        {"hidden_act": "silu", "linear_allow_neg_eigval": True},
    )
    reader.require("hidden_act", "silu")
    fields: dict[str, Any] = {ours: reader.positive(theirs) for ours, theirs in _NUMBERS.items()}
    if layout in _APART_LAYOUTS:
        fields |= {"norm_eps": _APART_EPS, "allow_neg_eigval": reader.boolean("linear_allow_neg_eigval")}
    else:
        fields["norm_eps"] = reader.number("rms_norm_eps")
    try:
        config = mixer_config({"type": "gated_delta_net", **fields})
    except ValueError as error:
        raise CheckpointError(f"{where} does not describe a possible layer: {error}") from error
    assert isinstance(config, GatedLinearAttentionConfig)
    return config


def gated_delta_net_values(config: GatedLinearAttentionConfig, layout: str) -> dict[str, Any]:
    """The part of a `config.json` of transformers that describes a `gated_delta_net`.

    Args:
        config: of the mixer.
        layout: one of `LAYOUTS`.

    Raises:
        CheckpointError: the layout cannot express the mixer; the obstacle is named.
    """
    _check_layout(layout)
    needed: dict[str, Any] = {
        "rule": "delta",
        "decay": "softplus_head",
        "feature_map": "l2_norm",
        "activation": "silu",
        "gate": "silu",
        "gate_low_rank": False,
        "use_rope": False,
        "num_kv_heads": config.num_heads,
    }
    if layout in _APART_LAYOUTS:
        needed["norm_eps"] = _APART_EPS
    else:
        needed["allow_neg_eigval"] = False
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"the mixer has {name}={getattr(config, name)!r}; layers of the layout {layout!r} have "
                f"{value!r} only."
            )
    if not config.conv_size:
        raise CheckpointError(f"the mixer has no convolution; layers of the layout {layout!r} have one.")
    values = {theirs: getattr(config, ours) for ours, theirs in _NUMBERS.items()}
    if layout in _APART_LAYOUTS:
        return {**values, "hidden_act": "silu", "linear_allow_neg_eigval": config.allow_neg_eigval}
    return {**values, "hidden_act": "silu", "rms_norm_eps": config.norm_eps}


def _check_layout(layout: str) -> None:
    if layout not in _LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is unknown. {suggest(str(layout), LAYOUTS)}")


def _layout_of(names: Collection[str], where: str) -> str:
    """The layout that shares most names with these."""
    shared = {layout: len(known.keys() & set(names)) for layout, known in _LAYOUTS.items()}
    layout = max(shared, key=lambda name: shared[name])
    if not shared[layout]:
        there = f"It has {min(names)!r}." if names else "No name begins so."
        raise CheckpointError(
            f"{where} has no weight of a Gated DeltaNet, such as 'A_log' or 'out_proj.weight'. {there} Give "
            "the weights of one layer, or their prefix."
        )
    return layout


def _on_meta(config: GatedLinearAttentionConfig) -> GatedLinearAttention:
    """The layer without storage."""
    where = "the config"
    model = build_config(where, vocab_size=1, d_model=config.d_model, layers=[config.to_dict()])
    try:
        layer = MemoryLM(model, device="meta").blocks[0].mixer
    except (OverflowError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{where} has sizes that no tensor has ({error}).") from error
    assert isinstance(layer, GatedLinearAttention)
    return layer


def _part_shapes(layer: GatedLinearAttention) -> dict[str, tuple[int, ...]]:
    """Shapes of our weights, with the convolution in its parts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    taps = shapes.pop(_CONVOLUTION)[1]
    return shapes | {name: (width, taps) for name, width in zip(_CONVOLUTIONS, layer.widths, strict=True)}


def _weight_map(layer: GatedLinearAttention, layout: str, prefix: str) -> dict[str, SourceWeight]:
    """Names and shapes of a layout, by name."""
    shapes = _part_shapes(layer)
    found = {}
    for theirs, names in _LAYOUTS[layout].items():
        rows, rest = sum(shapes[name][0] for name in names), shapes[names[0]][1:]
        is_convolution = names[0] in _CONVOLUTIONS
        shape = (rows, 1, *rest) if is_convolution else (rows, *rest)
        found[theirs] = SourceWeight(prefix + theirs, shape, has_middle_axis=is_convolution)
    return found


def _cut_anew(weights: Mapping[str, Tensor], names: list[str], widths: list[int]) -> dict[str, Tensor]:
    """Convolutions of the right widths, where only the cuts between them are wrong.

    transformers cuts the one convolution of Olmo Hybrid into three equal pieces when it saves a model,
    whatever the widths of keys and values are, and puts them together again when it loads.
    """
    found = [weights[name] for name in names if name in weights]
    if len(found) < len(names) or len({tensor.shape[1:] for tensor in found}) > 1:
        return {}
    if any(tensor.ndim == 0 for tensor in found) or sum(len(tensor) for tensor in found) != sum(widths):
        return {}
    return dict(zip(names, torch.cat(found).split(widths), strict=True))


def _groups(config: GatedLinearAttentionConfig, theirs: str) -> int:
    return config.num_heads if theirs in _BY_KEY_HEAD else 1


def _split(tensor: Tensor, rows: list[int], groups: int) -> list[Tensor]:
    """Parts of so many rows each, of which every group holds its share."""
    shares = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
    return [share.flatten(0, 1) for share in shares]


def _join(parts: list[Tensor], groups: int) -> Tensor:
    """What `_split` takes apart."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
