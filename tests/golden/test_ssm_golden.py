"""State-space layers against stored numbers of the public references (ssm.md beside this file)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from memzoo.kernels import LinearState, linear_attention, selective_scan, use_backend
from memzoo.layers import State, build_mixer
from memzoo.layers.contract import build_context
from memzoo.layers.mamba3 import Mamba3
from memzoo.layers.parts.norm import GatedRMSNorm
from memzoo.models.checkpoints.folder import load_model
from memzoo.models.checkpoints.mamba import mamba_weight_map
from memzoo.models.decoder import MemoryLM

DATA = np.load(Path(__file__).parent / "ssm_a.npz")


def load(case: str) -> dict[str, Tensor]:
    """All arrays of a case, without its name in front."""
    return {
        name.removeprefix(f"{case}."): torch.from_numpy(DATA[name])
        for name in DATA.files
        if name.startswith(f"{case}.") and DATA[name].dtype.kind in "fib"
    }


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    """The bound of the .md: 2e-5 max(1, |ref|) in float32, 1e-10 in float64."""
    bound = 1e-10 if expected.dtype == torch.float64 else 2e-5
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.detach().max()) <= bound, f"{name}: {float(error.detach().max()):.3g}"


def test_every_array_is_known() -> None:
    """Guards the loops over names in here."""
    assert {name.split(".")[0] for name in DATA.files} >= {"s6", "s6_plain", "s6_grouped", "ssd", "m1", "m2"}


def channels_last(name: str, x: Tensor) -> Tensor:
    """The layout of the file to ours."""
    if name in ("u", "delta", "z", "out", "grad_out"):
        return x.transpose(1, 2)
    if name in ("B", "C"):
        x = x[:, None] if x.dim() == 3 else x  # (B, G, N, T)
        return x.permute(0, 3, 1, 2)
    return x


@pytest.mark.parametrize(
    "backend, chunk_size", [("reference", None), ("torch", 1), ("torch", 4), ("torch", None)]
)
@pytest.mark.parametrize("case", ["s6", "s6_plain", "s6_grouped"])
def test_selective_scan(case: str, backend: str, chunk_size: int | None) -> None:
    arrays = load(case)
    names = [n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if n in arrays]
    inputs = {n: channels_last(n, arrays[n]).clone().requires_grad_() for n in names}
    assert set(names) >= {"u", "delta", "A", "B", "C", "delta_bias"}
    given = {("x" if n == "u" else n): x for n, x in inputs.items()}
    y, state = selective_scan(
        **given, delta_softplus=True, return_state=True, backend=backend, chunk_size=chunk_size
    )
    assert_near("out", y, channels_last("out", arrays["out"]))
    assert_near("last_state", state, arrays["last_state"])
    grads = torch.autograd.grad((y * channels_last("out", arrays["grad_out"])).sum(), list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        assert_near(f"d_{name}", grad, channels_last(name, arrays[f"d_{name}"]))


@pytest.mark.parametrize(
    "backend, chunk_size", [("reference", 64), ("torch", 4), ("torch", 7), ("torch", 64)]
)
@pytest.mark.parametrize("name", ["ssd", "ssd_noinit"])
def test_state_space_duality(name: str, backend: str, chunk_size: int) -> None:
    """SSD is linear attention with queries C, keys B, values dt x and log-decay dt A."""
    case = load(name)
    names = [n for n in ("x", "dt", "A", "B", "C", "initial_state") if n in case]
    inputs = {n: case[n].clone().requires_grad_() for n in names}
    start = inputs.get("initial_state")
    y, state = linear_attention(
        inputs["C"],
        inputs["B"],
        inputs["x"] * inputs["dt"][..., None],
        g=inputs["dt"] * inputs["A"],
        scale=1.0,
        initial_state=None if start is None else LinearState(start.transpose(2, 3)),
        return_state=True,
        chunk_size=chunk_size,
        backend=backend,
    )
    memory = state.memory.transpose(2, 3)
    assert_near("Y", y, case["Y"])
    assert_near("final_state", memory, case["final_state"])
    total = (y * case["grad_Y"]).sum() + (memory * case["grad_final_state"]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()))
    for n, grad in zip(inputs, grads, strict=True):
        assert_near(f"d_{n}", grad, case[f"d_{n}"])


@pytest.mark.parametrize("order", ["gate_then_norm", "norm_then_gate"])
def test_gated_norm(order: str) -> None:
    case = load("gnorm")
    norm = GatedRMSNorm(16, 2, 1e-5, norm_before_gate=order == "norm_then_gate")
    norm.load_state_dict({"weight": case["w"]})
    assert_near(order, norm(case["y"], case["z"]), case[f"out_{order}"])


def mixer_weights(case: dict[str, Tensor], layer: int = 0, kind: str = "param") -> dict[str, Tensor]:
    """The parameters of a mixer (or their gradients) under our names, which differ in one shape only."""
    prefix = f"{kind}.backbone.layers.{layer}.mixer."
    found = {name.removeprefix(prefix): x for name, x in case.items() if name.startswith(prefix)}
    return {name: x.squeeze(1) if name == "conv1d.weight" else x for name, x in found.items()}


MIXERS = {
    "m1": {"type": "mamba1", "d_model": 32, "d_state": 8, "conv_size": 4, "dt_rank": 4},
    "m2": {"type": "mamba2", "d_model": 32, "d_state": 8, "head_dim": 16, "num_groups": 2, "chunk_size": 4},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_outputs(name: str, backend: str) -> None:
    case, mixer = load(name), build_mixer(MIXERS[name])
    mixer.load_state_dict(mixer_weights(case))
    with use_backend(backend), torch.no_grad():
        assert_near("mixer0_out", mixer(case["mixer0_in"]).hidden, case["mixer0_out"])


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_states_of_prompt_and_steps(name: str) -> None:
    """Of the first layer, whose inputs the file holds; stored there are channels first and one input more."""
    case, mixer = load(name), build_mixer(MIXERS[name])
    mixer.load_state_dict(mixer_weights(case))
    prompt = int(case["prefill_len"])
    with torch.no_grad():
        out = mixer(case["mixer0_in"][:, :prompt], return_state=True)
        check_layer_state(case, "state_prefill", 0, out.state)
        for t in range(prompt, case["mixer0_in"].shape[1]):
            out = mixer.step(case["mixer0_in"][:, t], out.state)
            assert_near(f"step {t}", out.hidden, case["mixer0_out"][:, t])
            if t == prompt:
                check_layer_state(case, "state_step1", 0, out.state)
        check_layer_state(case, "state_final", 0, out.state)


def check_layer_state(case: dict[str, Tensor], kind: str, layer: int, state: State) -> None:
    assert_near(f"{kind} conv", state.tail.transpose(1, 2), case[f"{kind}.conv.{layer}"][..., 1:])
    memory = state.memory if state.memory.dim() == 3 else state.memory.transpose(2, 3)
    assert_near(f"{kind} ssm", memory, case[f"{kind}.ssm.{layer}"])


def mamba3_core(case: dict[str, Tensor], dtype: torch.dtype) -> tuple[Mamba3, dict[str, Tensor]]:
    """A layer with the biases of the file, and what it is given between projections and gate."""
    config = {"type": "mamba3", "d_model": 12, "d_state": 8, "head_dim": 6, "num_groups": 2}
    mixer = build_mixer({**config, "chunk_size": 4}).to(dtype)
    with torch.no_grad():
        for name in ("B_bias", "C_bias", "D"):
            getattr(mixer, name).copy_(case[name].view_as(getattr(mixer, name)))
    names = {
        "read": "C",
        "write": "B",
        "x": "x",
        "delta": "dt",
        "rates": "A",
        "trap": "trap",
        "angle": "angle",
    }
    given = {ours: case[theirs].to(dtype) for ours, theirs in names.items()}
    for name in ("delta", "rates", "trap"):
        given[name] = given[name].transpose(1, 2)  # (B, T, H)
    given["trap"] = given["trap"].sigmoid()
    return mixer, given


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 0, 7]])
@torch.no_grad()
def test_mamba3_recurrence(pieces: list[int], backend: str) -> None:
    case = load("m3")
    mixer, given = mamba3_core(case, torch.float32)
    outputs, state, at = [], mixer.init_state(2), 0
    for length in pieces:
        ctx = build_context((2, length), torch.device("cpu"), num_seen=state.num_tokens, return_state=True)
        part = {name: x[:, at : at + length] for name, x in given.items()}
        with use_backend(backend):
            y, state = mixer.recur(**part, ctx=ctx, state=state)
        outputs.append(y)
        at += length
    assert_near("out", torch.cat(outputs, 1) * F.silu(case["z"]), case["out"])
    assert_near("state_ssm", state.memory.transpose(2, 3), case["state_ssm"])
    assert_near("state_angle", state.angle, case["state_angle"])
    assert_near("state_k", state.key.squeeze(1), case["state_k"])
    assert_near("state_v", state.value.squeeze(1), case["state_v"])


def test_mamba3_equals_its_quadratic_form() -> None:
    """y_t = sum_s e^seg(t, s) w_s (q_t . k_s) x_s - (1 - lambda') delta' (q_t . k_t) x_t + D x_t."""
    case = load("m3")
    mixer, given = mamba3_core(case, torch.float64)
    ctx = build_context((2, 11), torch.device("cpu"), return_state=True)
    y, _ = mixer.recur(**given, ctx=ctx, state=None)
    turns = given["delta"][..., None] * (torch.pi * given["angle"].tanh())[:, :, None]
    phi = turns.cumsum(1)
    rotated = []
    for x, bias in ((given["read"], mixer.C_bias), (given["write"], mixer.B_bias)):
        x = x.repeat_interleave(2, 2) + bias.squeeze(1)
        turned = torch.view_as_complex(x[..., :4].unflatten(-1, (2, 2))) * torch.exp(1j * phi)
        rotated.append(torch.cat([torch.view_as_real(turned).flatten(-2), x[..., 4:]], -1))
    query, key = rotated
    second = F.pad((1 - given["trap"]) * given["delta"], (0, 0, 0, 1))[:, 1:]  # of the next token
    weight = given["trap"] * given["delta"] + second
    total = (given["delta"] * given["rates"]).cumsum(1)
    exponent = (total[:, :, None] - total[:, None]).masked_fill(
        torch.ones(11, 11).triu(1).bool()[..., None], -torch.inf
    )
    scores = torch.einsum("bthn,bshn->btsh", query, key)
    expected = torch.einsum("btsh,bshp->bthp", scores * exponent.exp() * weight[:, None], given["x"])
    own = mixer.D - second * scores.diagonal(dim1=1, dim2=2).transpose(1, 2)
    torch.testing.assert_close(y, expected + own[..., None] * given["x"], rtol=0, atol=1e-10)


LAYERS = {
    "m1": {"d_state": 8, "d_conv": 4, "dt_rank": 4},
    "m2": {"layer": "Mamba2", "d_state": 8, "d_conv": 4, "headdim": 16, "ngroups": 2},
}


@pytest.fixture(params=["m1", "m2"])
def language_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Tensor], MemoryLM]:
    """The stored model, read from a folder of the original code."""
    case = load(request.param)
    prefix = "param."
    weights = {n.removeprefix(prefix): x.contiguous() for n, x in case.items() if n.startswith(prefix)}
    save_file(weights, tmp_path / "model.safetensors")
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 48, "ssm_cfg": LAYERS[request.param]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return case, load_model(tmp_path)


def test_language_model_and_its_gradients(language_model: tuple[dict[str, Tensor], MemoryLM]) -> None:
    case, model = language_model
    out = model(case["input_ids"], return_hidden_states=True)
    assert_near("logits", out.logits, case["logits"])
    for layer, hidden in enumerate(case["hidden"]):
        if layer < len(case["hidden"]) - 1:  # theirs begins behind the first block
            assert_near(f"hidden {layer}", blocks_output(model, case["input_ids"], layer), hidden)
    assert_near("last hidden", out.hidden_states[-1], case["hidden"][-1])
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), case["input_ids"][:, 1:].flatten())
    assert_near("loss", loss, case["loss"].float())
    loss.backward()
    weight_map = mamba_weight_map(model.config, layout="state_spaces")
    found = 0
    for ours, parameter in model.named_parameters():
        name = f"grad.{weight_map[ours].name}"
        if name in case:
            assert_near(name, parameter.grad, case[name].reshape(parameter.shape))
            found += 1
    assert found == len([name for name in case if name.startswith("grad.")]) >= 10


def blocks_output(model: MemoryLM, ids: Tensor, layer: int) -> Tensor:
    """The residual stream behind a block."""
    hidden = model.embed(ids)
    for block in model.blocks[: layer + 1]:
        hidden = block.after_mixer(hidden, block.mixer(block.mixer_input(hidden)).hidden)
    return hidden


@torch.no_grad()
def test_language_model_decodes(language_model: tuple[dict[str, Tensor], MemoryLM]) -> None:
    case, model = language_model
    prompt = int(case["prefill_len"])
    out = model(case["input_ids"][:, :prompt], return_state=True)
    assert_near("logits_prefill", out.logits, case["logits_prefill"])
    for t in range(case["logits_steps"].shape[1]):
        if t < 2:
            for layer, state in enumerate(out.state.layers):
                check_layer_state(case, ("state_prefill", "state_step1")[t], layer, state)
        out = model.step(case["input_ids"][:, prompt + t], out.state)
        assert_near(f"step {t}", out.logits, case["logits_steps"][:, t])
    for layer, state in enumerate(out.state.layers):
        check_layer_state(case, "state_final", layer, state)


@torch.no_grad()
def test_language_model_under_a_mask_and_in_segments(
    language_model: tuple[dict[str, Tensor], MemoryLM],
) -> None:
    case, model = language_model
    mask = case["attention_mask"].bool()
    assert not mask.all()
    masked = model(case["input_ids"], mask=mask).logits
    assert_near("logits_masked", masked[mask], case["logits_masked"][mask])
    segments = case["segments"].tolist() if "segments" in case else [5, 1, 4, 3]
    pieces, state = [], None
    for part in case["input_ids"].split(segments, dim=1):
        out = model(part, state, return_state=True)
        pieces.append(out.logits)
        state = out.state
    assert_near("segments", torch.cat(pieces, 1), case["logits"])
