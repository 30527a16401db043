"""Conversion of pretrained models: surgery on mixers and the report that says what it did."""

from .surgery import (
    Check,
    ParityReport,
    check_parity,
    convert_mixers,
    converted_config,
    layer_errors,
    memory_off,
    relative_error,
)

__all__ = [
    "Check",
    "ParityReport",
    "check_parity",
    "convert_mixers",
    "converted_config",
    "layer_errors",
    "memory_off",
    "relative_error",
]
