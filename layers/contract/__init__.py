"""What every token mixer obeys: base class, state, context, configuration, probe."""

from .config import MixerConfig, check_choice, check_positive, check_size, number_hint, suggest
from .context import SequenceContext, build_context
from .mixer import LayerOutput, TokenMixer, config_span, tag_parameter
from .probe import is_probing, probe, record
from .state import State, host_field

__all__ = [
    "LayerOutput",
    "MixerConfig",
    "SequenceContext",
    "State",
    "TokenMixer",
    "build_context",
    "check_choice",
    "check_positive",
    "check_size",
    "config_span",
    "host_field",
    "is_probing",
    "number_hint",
    "probe",
    "record",
    "suggest",
    "tag_parameter",
]
