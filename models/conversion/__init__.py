"""Conversion of pretrained models: the plan, the surgery on mixers, and the report of what it did."""

from .finite import find_not_finite, first_not_finite
from .gates import attach_retention_gates, gate_weights, load_gates, save_gates
from .plan import (
    ConversionPlan,
    LayerSelection,
    complete_entry,
    converted_config,
    exact_reach,
    select_layers,
    window_of,
)
from .surgery import Check, ParityReport, check_parity, convert_mixers, layer_errors, relative_error
from .switches import memory_off, other_mixers
from .weight_maps import StackedSource, WeightSource, expand_gqa, register_weight_map, weight_map

__all__ = [
    "Check",
    "ConversionPlan",
    "LayerSelection",
    "ParityReport",
    "StackedSource",
    "WeightSource",
    "attach_retention_gates",
    "check_parity",
    "complete_entry",
    "convert_mixers",
    "converted_config",
    "exact_reach",
    "expand_gqa",
    "find_not_finite",
    "first_not_finite",
    "gate_weights",
    "layer_errors",
    "load_gates",
    "memory_off",
    "other_mixers",
    "register_weight_map",
    "relative_error",
    "save_gates",
    "select_layers",
    "weight_map",
    "window_of",
]
