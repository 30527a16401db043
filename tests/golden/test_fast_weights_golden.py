"""The fast-weight memory against numbers of LaCT's own code and of AllMem's equations (the .md beside)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import fast_weight_scan, fast_weight_shapes, newton_schulz, unpack_fast_weights
from memzoo.testing import assert_close

FOLDER = Path(__file__).parent
LACT = np.load(FOLDER / "lact_a.npz")
ALLMEM = np.load(FOLDER / "allmem_a.npz")
# The bounds of lact.md.
BOUNDS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
MATRICES = ("Wg", "Wu", "Wd")


def load(data: np.lib.npyio.NpzFile, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    arrays = {
        name.removeprefix(f"{case}__"): data[name] for name in data.files if name.startswith(f"{case}__")
    }
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def settings(data: np.lib.npyio.NpzFile, case: str) -> dict:
    return json.loads(str(data["config_json"]))[case]


def heads(x: Tensor) -> Tensor:
    """(B, n, T, ...) of the files to our (B, T, n, ...), or back."""
    return x.transpose(1, 2)


def check_gradients(case: dict[str, Tensor], out: Tensor, leaves: dict[str, Tensor], bound: float) -> None:
    assert_close("out", out, case["out"], bound)
    grads = torch.autograd.grad((out * case["grad_out"]).sum(), list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        # what no read depends on has gradient zero in the files
        found = torch.zeros_like(leaf) if grad is None else grad
        assert_close(f"grad_{name}", found, case[f"grad_{name}"], bound)


@pytest.mark.parametrize("dtype, bound", BOUNDS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["sgd", "mom", "mom_pre", "muon", "short"])
def test_lact(name: str, backend: str, dtype: torch.dtype, bound: float) -> None:
    config, case = settings(LACT, name), load(LACT, name, dtype)
    bound = 1e-3 if config["use_muon"] and dtype == torch.float32 else bound
    names = ["q", "k", "v", "w0", "w1", "w2", "lr0", "lr1", "lr2", *(["momentum"] * config["momentum"])]
    leaves = {key: case[key].requires_grad_() for key in names}
    # rows of the file are batch x heads, each with a net of its own: heads of one sequence here
    q, k, v = (leaves[key].transpose(0, 1)[None] for key in ("q", "k", "v"))
    rates = torch.cat([leaves[key] for key in ("lr0", "lr2", "lr1")], dim=-1).transpose(0, 1)[None]
    momentum = leaves["momentum"][..., 0].T[None] if config["momentum"] else None
    out, _ = fast_weight_scan(
        q,
        k,
        v,
        rates,
        momentum,
        [leaves[key] for key in ("w0", "w2", "w1")],  # gate, up, down
        residual=False,
        optimizer="muon" if config["use_muon"] else "momentum" if config["momentum"] else "sgd",
        fast_norm=config["fast_norm"],
        chunk_size=config["chunk_size"],
        backend=backend,
    )
    check_gradients(case, out[0].transpose(0, 1), leaves, bound)


@pytest.mark.parametrize("dtype, bound", BOUNDS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["internal", "post", "pre", "none_l2", "clip", "nores_l2"])
def test_allmem(name: str, backend: str, dtype: torch.dtype, bound: float) -> None:
    config, case = settings(ALLMEM, name), load(ALLMEM, name, dtype)
    leaves = {key: case[key].requires_grad_() for key in ("q", "k", "v", "eta", "mu", *MATRICES)}
    q, k, v, rates, momentum = (heads(leaves[key]) for key in ("q", "k", "v", "eta", "mu"))
    out, state = fast_weight_scan(
        q,
        k,
        v,
        rates,
        momentum,
        [leaves[key] for key in MATRICES],
        residual=config["res"],
        loss=config["loss"],
        fast_norm=config["norm"],
        chunk_size=config["chunk_size"],
        max_grad_norm=config["clip"],
        return_state=True,
        backend=backend,
    )
    check_gradients(case, heads(out), leaves, bound)
    shapes = fast_weight_shapes("swiglu", q.shape[-1], case["Wg"].shape[-2])
    for label, flat in (("final", state.weights), ("final_M", state.momentum)):
        for key, matrix in zip(MATRICES, unpack_fast_weights(flat, shapes), strict=True):
            assert_close(f"{label}_{key}", matrix, case[f"{label}_{key}"], bound)


@pytest.mark.parametrize("name", ["ns_wide", "ns_tall", "ns_square", "ns_zero"])
def test_newton_schulz(name: str) -> None:
    case = load(LACT, name, torch.float64)
    assert_close("out", newton_schulz(case["in"]), case["out"], 1e-12)


def test_every_case_is_covered() -> None:
    layers = {"layer", "layer_lr"}
    assert set(settings_of(LACT)) - layers == {"sgd", "mom", "mom_pre", "muon", "short"}
    assert set(settings_of(ALLMEM)) - layers == {"internal", "post", "pre", "none_l2", "clip", "nores_l2"}


def settings_of(data: np.lib.npyio.NpzFile) -> dict:
    return json.loads(str(data["config_json"]))
