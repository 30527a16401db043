"""What the configs of mLSTM and gated slot attention refuse."""

import math

import pytest

from memzoo.layers import build_mixer


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "mlstm", "norm_eps": None}, "norm_eps must be a number, got None"),
        ({"type": "mlstm", "gate_soft_cap": "15"}, "gate_soft_cap must be a number, got '15'"),
        ({"type": "mlstm", "input_gate_bias": math.nan}, "input_gate_bias must be a finite number, got nan"),
        ({"type": "mlstm", "expand_v": "1"}, "expand_v must be a number, got '1'"),
        ({"type": "gsa", "norm_eps": "1e-5"}, "norm_eps must be a number, got '1e-5'"),
        ({"type": "gsa", "norm_eps": math.inf}, "norm_eps must be above 0 and finite, got inf"),
        ({"type": "gsa", "expand_k": None}, "expand_k must be a number, got None"),
    ],
)
def test_refused_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"d_model": 12, "num_heads": 2, **config})
