"""ARKV, CompressKV, WindowKV and D2O against the methods' own code (kv_methods_a.md)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.layers.policies import (
    AttentionMass,
    Entries,
    EvictionPolicy,
    GroupedArithmeticBudget,
    HeavyHitter,
    LayerMemory,
    Observation,
    PreferenceBudget,
    SimilarityMerger,
    WholeWindows,
    WindowAttention,
    WindowedAttention,
    quantize_fp8,
)
from memzoo.layers.policies.budgets import error_aware
from memzoo.layers.policies.policy import NO_THRESHOLD

DATA = np.load(Path(__file__).parent / "kv_methods_a.npz")
SIZES = dict(zip(DATA["cfg_names"].tolist(), DATA["cfg_values"].tolist(), strict=True))
WINDOW, LENGTH = int(SIZES["window"]), 48


def array(name):
    return torch.from_numpy(DATA[name])


def entries():
    key, value = array("k"), array("v")
    order = torch.arange(1, LENGTH + 1, dtype=torch.int32).expand(key.shape[:3])
    return Entries(key, value, order)


def observation(layer=0, last=LENGTH):
    queries = array("q").transpose(1, 2)[:, LENGTH - last :]
    return Observation(LENGTH, queries.shape[-1] ** -0.5, queries, last, layer)


@pytest.mark.parametrize(
    ("name", "gamma", "last"), [("gamma0", 0.0, LENGTH), ("gamma5", 0.5, LENGTH), ("decode", 0.5, 1)]
)
def test_arkv_scores(name, gamma, last):
    found = HeavyHitter(WINDOW, gamma).score(entries(), observation(last=last))
    assert torch.isinf(found[..., -WINDOW:]).all()
    torch.testing.assert_close(found[..., :-WINDOW], array(f"arkv_hh_{name}"), rtol=0, atol=1e-5)


def test_arkv_layer_statistics():
    taus = tuple(array("arkv_pref_taus").tolist())
    budget = PreferenceBudget(LENGTH, WINDOW, taus)
    rows = []
    for row in range(2):
        one = entries().map(lambda x, row=row: x[row : row + 1])
        obs = replace(observation(), queries=observation().queries[row : row + 1])
        rows.append(budget.observe(one, obs))
    stats = torch.stack(rows).sum(0)
    expected = torch.stack([array(f"arkv_{name}") for name in ("entropy", "variance", "kurtosis")]).double()
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=0)
    assert budget.preference(stats) == pytest.approx(float(array("arkv_preference")), rel=1e-5)


def test_arkv_eight_bits():
    key = array("k")
    codes, scale = quantize_fp8(key, is_shared=True)
    torch.testing.assert_close(scale[0, 0, :, 0], array("arkv_fp8_scale").flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.float() * scale, array("arkv_fp8_dequant"), rtol=0, atol=1e-5)
    # a scale of one's own is never coarser
    codes, own = quantize_fp8(key)
    assert bool((own <= scale + 1e-9).all())


@pytest.mark.parametrize("layer", [0, 1])
def test_compresskv_choice(layer):
    heads = tuple(tuple(row) for row in array("compresskv_heads").tolist())
    budget = int(array("compresskv_budgets")[layer])
    chosen = EvictionPolicy(
        scorer=WindowAttention(WINDOW, 5, heads=heads), budget=budget, recent=WINDOW, prefill="one_shot"
    )
    scores = chosen.scorer.score(entries(), observation(layer))
    index, _ = chosen.select(scores, entries(), budget)
    expected = array(f"compresskv_kept_layer{layer}").long()
    for head in range(2):
        assert torch.equal(index[:, head], expected)


def test_error_aware_budgets():
    names = [name for name in DATA.files if name.startswith("erroraware_") and name.endswith("_args")]
    assert names
    for name in names:
        total, least, most = (int(x) for x in array(name))
        importance = array(name.replace("args", "importance")).tolist()
        assert error_aware(importance, total, least, most) == array(name.replace("args", "budgets")).tolist()


@pytest.mark.parametrize("strategy", ["max", "average"])
def test_windowkv_choice(strategy):
    sizes = dict(zip(DATA["windowkv_cfg_names"].tolist(), DATA["windowkv_cfg_values"].tolist(), strict=True))
    tokens, group = int(sizes["win"]), int(sizes["grp"])
    suffix = int(sizes["smax" if strategy == "max" else "savg"])
    budgets = GroupedArithmeticBudget(int(sizes["cap"]), group, int(sizes["beta"])).layer_budgets(
        int(sizes["L"]), LENGTH
    )
    assert budgets == array(f"windowkv_{strategy}_budgets").tolist()
    scorer, selector = WindowedAttention(tokens, suffix, strategy), WholeWindows(tokens, suffix)
    names = [name for name in DATA.files if name.startswith(f"windowkv_{strategy}_kept_layer")]
    assert names
    for name in names:
        layer = int(name.rsplit("layer", 1)[1])
        keep = selector.keep(scorer.score(entries(), observation(layer)), entries(), budgets[layer])
        expected = array(name)
        assert keep[0, 0].nonzero().flatten().tolist() == expected[expected >= 0].tolist(), name
        assert torch.equal(keep[:, 0], keep[:, 1])


def test_d2o_steps():
    heavy, recent, alpha, beta = array("d2o_args").tolist()
    budget = int(heavy + recent)
    chosen = EvictionPolicy(
        scorer=AttentionMass(),
        budget=budget,
        sinks=4,
        recent=int(recent),
        merger=SimilarityMerger(alpha, beta, "code", shared_filter=True),
    )
    key, value, score = array("d2o_k0"), array("d2o_v0"), array("d2o_score0")[None]
    order = torch.arange(1, key.shape[2] + 1, dtype=torch.int32).expand(key.shape[:3])
    held = Entries(key, value, order, score, torch.ones_like(order))
    memory = LayerMemory(held, key.shape[2], budget, threshold=torch.full((1, 1), NO_THRESHOLD))
    query = torch.zeros(1, 1, key.shape[1], key.shape[3])
    memory = chosen.compress(memory, query)
    check_d2o(memory, "d2o_{}1")
    for step in range(2):
        new = array(f"d2o_step{step}_knew"), array(f"d2o_step{step}_vnew")
        gained = array(f"d2o_step{step}_attn")[None]
        joined = Entries(
            torch.cat([memory.entries.key, new[0]], dim=2),
            torch.cat([memory.entries.value, new[1]], dim=2),
            torch.nn.functional.pad(memory.entries.order, (0, 1), value=memory.num_seen + 1),
            torch.nn.functional.pad(memory.entries.score, (0, 1)) + gained,
            torch.nn.functional.pad(memory.entries.count, (0, 1), value=1),
        )
        memory = replace(memory, entries=joined, num_seen=memory.num_seen + 1)
        memory = chosen.compress(memory, query)
        check_d2o(memory, f"d2o_step{step}_{{}}")


def check_d2o(memory, name):
    torch.testing.assert_close(memory.entries.key, array(name.format("k")), rtol=0, atol=1e-5)
    torch.testing.assert_close(memory.entries.value, array(name.format("v")), rtol=0, atol=1e-5)
    expected = array(name.format("tau")).flatten()
    torch.testing.assert_close(memory.threshold.flatten(), expected.to(memory.threshold), rtol=0, atol=1e-5)
