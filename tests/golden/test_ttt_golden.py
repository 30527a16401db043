"""TTT layers against stored numbers of the authors' code (ttt_linear.md and ttt_mlp.md beside this file).

Bound as the files state: 1e-6, because that code rotates with float32 tables.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import use_backend
from memzoo.layers import TokenMixer, build_mixer

FILES = [np.load(Path(__file__).parent / f"ttt_{kind}_a.npz") for kind in ("linear", "mlp")]
SETTINGS = {case: c for file in FILES for case, c in json.loads(str(file["config_json"])).items()}
ARRAYS = {
    name: torch.from_numpy(file[name]) for file in FILES for name in file.files if name != "config_json"
}
WEIGHTS = {
    "learnable_token_idx": "reader_offset",
    "learnable_ttt_lr_weight": "rate_proj.weight",
    "learnable_ttt_lr_bias": "rate_proj.bias",
    "ttt_norm_weight": "norm_weight",
    "ttt_norm_bias": "norm_bias",
    "g_proj.weight": "gate_proj.weight",
    **{name: name.lower() for name in ("W1", "b1", "W2", "b2")},
}
CASES = pytest.mark.parametrize("case", SETTINGS)


def load(case: str) -> dict[str, Tensor]:
    """All arrays of a case, without its name in front."""
    return {name.removeprefix(f"{case}__"): x for name, x in ARRAYS.items() if name.startswith(f"{case}__")}


def build(case: str, arrays: dict[str, Tensor]) -> tuple[TokenMixer, dict[str, str]]:
    """The layer with every weight of the case, and the names of its weights by theirs."""
    c = SETTINGS[case]
    mixer = build_mixer(
        {
            "type": f"ttt_{c['kind']}",
            "d_model": c["hidden_size"],
            "num_heads": c["num_attention_heads"],
            "mini_batch_size": c["mini_batch_size"],
            "base_lr": c["ttt_base_lr"],
            "rope_theta": c["rope_theta"],
            "use_gate": c["use_gate"],
            "share_qk": c["share_qk"],
        }
    ).double()
    own = mixer.state_dict()
    theirs = [name.removeprefix("p.") for name in arrays if name.startswith("p.")]
    names = {name: WEIGHTS.get(name, name) for name in theirs}
    mixer.load_state_dict({ours: arrays[f"p.{name}"].view_as(own[ours]) for name, ours in names.items()})
    return mixer, names


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    error = float((actual.reshape(expected.shape) - expected).detach().abs().max())
    assert error <= 1e-6 * max(1.0, float(expected.abs().max())), f"{name}: {error:.3g}"


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
    x, start = arrays["x"], SETTINGS[case]["decode_prefill"]
    with torch.no_grad():
        out = mixer(x[:, :start], return_state=True)
        pieces, state = [out.hidden], out.state
        for t in range(start, x.shape[1]):
            out = mixer.step(x[:, t], state)
            pieces.append(out.hidden[:, None])
            state = out.state
    assert_near("y_decode", torch.cat(pieces, dim=1), arrays["y_decode"])
    checked = 0
    for name in ("W1", "b1", "W2", "b2"):
        if f"state_{name}_states" in arrays:
            assert_near(name, getattr(state, name.lower()), arrays[f"state_{name}_states"])
            assert_near(
                f"{name} grad", getattr(state, f"pending_{name.lower()}"), arrays[f"state_{name}_grad"]
            )
            checked += 1
    assert checked == len(mixer.names)
