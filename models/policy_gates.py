"""Retention gates in plain models of transformers, for `PolicyCache` with the policy `retention`."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.parts.retention_gate import RetentionGate
from .conversion.gates import GATE_PREFIX, read_gates


def attach_gates(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts saved gates into the attention layers of a model, in place; they say nothing until a policy asks.

    Args:
        model: a decoder of the Llama family, the model that the gates belong to.
        folder: of `save_gates`.

    Raises:
        CheckpointError: no such folder, or one that is damaged.
        ValueError: gates that read keys and values, or sizes that do not fit.
    """
    facts, weights = read_gates(folder)
    layers = {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj")
    }
    sizes = model.config.get_text_config(decoder=True)
    for name, entry in facts["layers"].items():
        if entry["gate"] not in ("mlp", "mlp3"):
            raise ValueError(
                f"gates of kind {entry['gate']!r} read keys and values, which layers of transformers do not "
                "hand out. Use them in a model of this library."
            )
        index, own = int(name), (sizes.hidden_size, sizes.num_key_value_heads)
        if index not in layers or own != (entry["d_model"], entry["num_kv_heads"]):
            raise ValueError(
                f"the gates in {str(folder)!r} belong to {facts.get('base')!r}: layer {index} of width "
                f"{entry['d_model']} with {entry['num_kv_heads']} key/value heads, which this model has not."
            )
        gate = RetentionGate(
            entry["d_model"],
            entry["num_kv_heads"],
            entry["head_dim"],
            width=entry["gate_width"],
            activation=entry["gate_activation"],
            kind=entry["gate"],
        )
        prefix = GATE_PREFIX.format(index)
        gate.load_state_dict(
            {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
        )
        place = next(layers[index].parameters())
        layers[index].retention_gate = gate.to(place.device).requires_grad_(False).eval()
    return model


def detach_gates(model: nn.Module) -> None:
    """Takes the gates out again."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module._modules.get("retention_gate"), RetentionGate):
                del module.retention_gate
