"""B'MOJO against stored arrays (bmojo.md: float64, 1e-10): the public layer, and ours by its definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.layers import LayerOutput, build_mixer, probe
from memzoo.layers.bmojo import BMojoMixer
from memzoo.testing import assert_close

DATA = np.load(Path(__file__).parent / "bmojo_a.npz")
CONFIGS = json.loads(str(DATA["config_json"]))
F_CASES = ["f_tied", "f_untied_bias", "f_short"]
FULL_CASES = ["full_topm", "full_thr_sink", "full_fixedrope"]
FORMS = ["merged", "concatenated"]
BOUND = 1e-10


def array(name: str) -> Tensor:
    return torch.from_numpy(np.array(DATA[name]))


def our_name(name: str) -> str:
    """Names of the public layer: its second set of projections and norms has a trailing underscore."""
    module, _, kind = name.partition(".")
    return f"fading_{module.removesuffix('_')}.{kind}" if module.endswith("_") else name


def build(case: str, form: str, **options: object) -> BMojoMixer:
    values = CONFIGS[case]
    ssm, eidetic = values.get("ssm"), values.get("eidetic", {})
    inner: list[dict[str, object]] = [{"type": "base_conv"}]
    if ssm is not None:
        inner = [
            {
                "type": "mamba2",
                "head_dim": ssm["headdim"],
                "d_state": ssm["d_state"],
                "num_groups": ssm["ngroups"],
                "expand": ssm["n_heads"] * ssm["headdim"] // values["d_model"],
            }
        ]
    mixer = build_mixer(
        {
            "type": "bmojo",
            "d_model": values["d_model"],
            "num_heads": values["n_heads"],
            "num_kv_heads": values["n_kv_heads"],
            "head_dim": values["head_dim"],
            "window_size": values["window"],
            "qk_norm": values["qk_norm"],
            "rope_theta": values["rope_theta"],
            "tie_weights": values["tie_attn_weights"],
            "qkv_bias": values.get("bias", False),
            "o_bias": values.get("bias", False),
            "eidetic_size": eidetic.get("m", 0),
            "eidetic_chunk_size": eidetic.get("C"),
            "innovation_threshold": eidetic.get("theta"),
            "eidetic_sinks": eidetic.get("n_sink", 0),
            "predictor_order": eidetic.get("p", 4),
            "predictor_decay": eidetic.get("rho", 0.5),
            "eidetic_rope": eidetic.get("rope", "absolute"),
            "mixers": inner,
            "form": form,
            **options,
        }
    ).double()
    assert isinstance(mixer, BMojoMixer)
    weights = {}
    for prefix, place in ((f"{case}.param.", ""), (f"{case}.ssm.", "mixers.0.")):
        for name in DATA.files:
            if name.startswith(prefix):
                weights[place + our_name(name.removeprefix(prefix))] = array(name)
    if "mixers.0.conv1d.weight" in weights:
        weights["mixers.0.conv1d.weight"] = weights["mixers.0.conv1d.weight"].squeeze(1)
    missing, unexpected = mixer.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("mixers.0.") for name in missing)
    assert ssm is None or not missing
    return mixer


def give_fading(mixer: BMojoMixer, fading: Tensor) -> None:
    """Lets the inner mixer return given fading tokens, whatever it reads."""
    inner = mixer.mixers[0]
    plain = inner.mix

    def mix(x: Tensor, ctx: object, state: object) -> LayerOutput:
        at = ctx.positions[0]  # type: ignore[attr-defined]
        return LayerOutput(fading[:, at], plain(x, ctx, state).state)

    inner.mix = inner.mix_step = mix  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", F_CASES)
def test_public_layer(case: str, form: str) -> None:
    mixer = build(case, form)
    x, fading = array(f"{case}.x").requires_grad_(), array(f"{case}.fading").requires_grad_()
    give_fading(mixer, fading)
    out = mixer(x).hidden
    assert_close("out", out, array(f"{case}.out"), BOUND)
    (out * array(f"{case}.grad_out")).sum().backward()
    assert x.grad is not None
    assert_close("d_x", x.grad, array(f"{case}.d_x"), BOUND)
    d_fading = torch.zeros_like(fading) if fading.grad is None else fading.grad
    assert_close("d_fading", d_fading, array(f"{case}.d_fading"), BOUND)
    found = dict(mixer.named_parameters())
    checked = 0
    for name in DATA.files:
        if name.startswith(f"{case}.d_param."):
            grad = found[our_name(name.removeprefix(f"{case}.d_param."))].grad
            assert grad is not None
            assert_close(name, grad, array(name), BOUND)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("case", F_CASES)
def test_public_layer_token_by_token(case: str) -> None:
    mixer, x = build(case, "merged"), array(f"{case}.x")
    give_fading(mixer, array(f"{case}.fading"))
    prefill = CONFIGS[case]["prefill"]
    with torch.no_grad():
        out = mixer(x[:, :prefill], return_state=True)
        parts, state = [out.hidden], out.state
        for t in range(prefill, x.shape[1]):
            out = mixer.step(x[:, t], state)
            parts.append(out.hidden[:, None])
            state = out.state
    assert_close("out_decode", torch.cat(parts, 1), array(f"{case}.out_decode"), BOUND)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", FULL_CASES)
def test_full_layer(case: str, form: str) -> None:
    mixer, x = build(case, form), array(f"{case}.x")
    with torch.no_grad(), probe() as seen:
        fading = mixer.mixers[0](x).hidden
        out = mixer(x, return_state=True)
    assert_close("fading", fading, array(f"{case}.fading"), BOUND)
    assert_close("scores", seen["innovation"][0], array(f"{case}.scores"), BOUND)
    selected = array(f"{case}.selected")
    assert torch.equal(seen["stored_positions"][0].sort(-1).values, selected.sort(-1).values)
    assert_close("out", out.hidden, array(f"{case}.out"), BOUND)
    stored = out.state.stored_positions()
    assert torch.equal(stored.sort(-1).values, selected[:, -1].sort(-1).values)


@pytest.mark.parametrize("case", FULL_CASES)
def test_full_layer_in_float32(case: str) -> None:
    mixer = build(case, "merged").float()
    with torch.no_grad():
        out = mixer(array(f"{case}.x").float()).hidden
    assert_close("out", out.double(), array(f"{case}.out"), 2e-5)
