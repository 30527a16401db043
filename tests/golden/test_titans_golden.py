"""The neural memory of Titans against stored numbers of titans-pytorch (titans.md beside this file)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import use_backend
from memzoo.layers import TokenMixer, build_mixer
from memzoo.testing import assert_close

FILE = np.load(Path(__file__).parent / "titans_a.npz")
SETTINGS = json.loads(str(FILE["config_json"]))
ARRAYS = {name: torch.from_numpy(FILE[name]) for name in FILE.files if name != "config_json"}
WEIGHTS = {
    "to_queries.weight": "q_proj.weight",
    "to_keys.weight": "k_proj.weight",
    "to_values.weight": "v_proj.weight",
    "to_adaptive_step.0.weight": "rate_proj.weight",
    "to_adaptive_step.0.bias": "rate_proj.bias",
    "to_momentum.0.weight": "momentum_proj.weight",
    "to_momentum.0.bias": "momentum_proj.bias",
    "to_decay_factor.0.weight": "decay_proj.weight",
    "to_decay_factor.0.bias": "decay_proj.bias",
    "q_norm.gamma": "q_gain",
    "k_norm.gamma": "k_gain",
    "multihead_rmsnorm.gamma": "out_gain",
    "retrieve_gate.0.weight": "gate_proj.weight",
    "combine_heads.weight": "o_proj.weight",
    "memory_model_parameters.0": "gain",
    "memory_model_parameters.1": "w1",
    "memory_model_parameters.2": "w2",
}
CASES = pytest.mark.parametrize("case", SETTINGS)


def load(case: str) -> dict[str, Tensor]:
    """All arrays of a case, without its name in front."""
    return {name.removeprefix(f"{case}__"): x for name, x in ARRAYS.items() if name.startswith(f"{case}__")}


def build(case: str, arrays: dict[str, Tensor]) -> tuple[TokenMixer, dict[str, str]]:
    """The layer with every weight of the case, and the names of its weights by theirs."""
    kw, mlp = SETTINGS[case]["kw"], SETTINGS[case]["mlp"]
    mixer = build_mixer(
        {
            "type": "titans",
            "d_model": kw["dim"],
            "num_heads": kw["heads"],
            "head_dim": kw.get("dim_head"),
            "chunk_size": kw["chunk_size"],
            "batch_size": kw.get("batch_size"),
            "use_momentum": kw.get("momentum", True),
            "depth": mlp["depth"],
            "expansion": mlp.get("expansion_factor", 4.0),
            "qk_norm": "rms" if kw.get("qk_rmsnorm") else "none",
            "out_norm": kw.get("post_rmsnorm", False),
            "norm_eps": float(np.finfo(np.float64).eps),
        }
    ).double()
    own = mixer.state_dict()
    theirs = [name.removeprefix("p.") for name in arrays if name.startswith("p.")]
    names = {name: WEIGHTS.get(name, name) for name in theirs}
    mixer.load_state_dict({ours: arrays[f"p.{name}"].view_as(own[ours]) for name, ours in names.items()})
    return mixer, names


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    assert_close(name, actual.reshape(expected.shape), expected, 1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@CASES
def test_outputs_and_gradients(case: str, backend: str) -> None:
    arrays = load(case)
    mixer, names = build(case, arrays)
    x = arrays["x"].clone().requires_grad_()
    with use_backend(backend):
        y = mixer(x).hidden
    assert_near("y", y, arrays["y"])
    y.backward(arrays["grad_y"])
    assert_near("grad x", x.grad, arrays["grad_x"])
    for theirs, ours in names.items():
        assert_near(f"grad {theirs}", mixer.get_parameter(ours).grad, arrays[f"grad_p.{theirs}"])


@CASES
def test_decoding_and_states(case: str) -> None:
    arrays = load(case)
    mixer, _ = build(case, arrays)
    x, pieces = arrays["x"], []
    with torch.no_grad():
        whole = mixer(x, return_state=True).state
        state = mixer.init_state(x.shape[0], dtype=x.dtype)
        for t in range(x.shape[1]):
            out = mixer.step(x[:, t], state)
            pieces.append(out.hidden[:, None])
            state = out.state
    assert_near("y_decode", torch.cat(pieces, dim=1), arrays["y_decode"])
    for ours, theirs in (("weights", "state_M"), ("momentum", "state_S")):
        stored = [
            arrays[f"{theirs}.{name}"]
            for name in SETTINGS[case]["memory_param_names"]
            if f"{theirs}.{name}" in arrays
        ]
        assert len(stored) == (len(mixer.names) if theirs == "state_M" or mixer.config.use_momentum else 0)
        if stored:
            lead = getattr(whole, ours).shape[:2]
            expected = torch.cat([part.reshape(*lead, -1) for part in stored], dim=-1)
            for found in (whole, state):
                assert_near(theirs, getattr(found, ours), expected)
