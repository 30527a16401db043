"""Token mixers, their parts, and the contract that all of them keep."""

from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    host_field,
    is_probing,
    probe,
    record,
    tag_parameter,
)
from .registry import build_mixer, list_mixers, mixer_config, register_mixer, register_preset

__all__ = [
    "LayerOutput",
    "MixerConfig",
    "SequenceContext",
    "State",
    "TokenMixer",
    "build_mixer",
    "host_field",
    "is_probing",
    "list_mixers",
    "mixer_config",
    "probe",
    "record",
    "register_mixer",
    "register_preset",
    "tag_parameter",
]
