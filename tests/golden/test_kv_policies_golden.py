"""Scores, kept sets and merged values against kvpress 0.5.5 (kv_policies_a.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.layers.policies import (
    AttentionMass,
    Entries,
    EvictionPolicy,
    FewerChannels,
    HeadAdaptive,
    KeyDiff,
    KeyNorm,
    LastQuery,
    LayerMemory,
    Observation,
    PyramidBudget,
    Recency,
    ValueMerger,
    WindowAttention,
    rerotate_keys,
)
from memzoo.layers.policies.budgets import pyramid
from memzoo.layers.policies.tiers import kept_channels

DATA = np.load(Path(__file__).parent / "kv_policies_a.npz")
SIZES = dict(zip(DATA["cfg_names"].tolist(), DATA["cfg_values"].tolist(), strict=True))
RATIOS = (25, 50, 75)
WINDOW = int(SIZES["window"])


def array(name):
    return torch.from_numpy(DATA[name])


def entries(score=None):
    key, value = array("k"), array("v")
    order = torch.arange(1, key.shape[2] + 1, dtype=torch.int32).expand(key.shape[:3])
    return Entries(key, value, order, score)


def observation():
    queries = array("q").transpose(1, 2)  # (B, T, H, D)
    length = queries.shape[1]
    return Observation(length, queries.shape[-1] ** -0.5, queries, length)


def mass():
    """What the cache accumulates while it reads: (B, G, C)."""
    weights = array("attn").unflatten(1, (array("k").shape[1], -1))  # (B, G, R, T, C)
    return AttentionMass().observe(weights, observation())


def policy(name, budget):
    scorers = {
        "snapkv": WindowAttention(WINDOW, int(SIZES["kernel"])),
        "tova": LastQuery(),
        "knorm": KeyNorm(),
        "observed": AttentionMass(normalize=True),
        "keydiff": KeyDiff(),
        "streaming": Recency(),
    }
    sinks = {"streaming": int(SIZES["n_sink"])}
    return EvictionPolicy(scorer=scorers[name], budget=budget, sinks=sinks.get(name, 0), prefill="one_shot")


def compressed(chosen, budget):
    held = entries(mass() if chosen.scorer.accumulates else None)
    memory = LayerMemory(held, held.num_slots, budget)
    return chosen.compress(memory, observation().queries).entries


@pytest.mark.parametrize("name", ["snapkv", "tova", "knorm", "observed", "keydiff"])
def test_scores(name):
    held = entries(mass())
    found, expected = policy(name, 39).scorer.score(held, observation()), array(f"{name}_scores")
    free = torch.isfinite(found)
    assert free.sum(-1).unique().tolist() == [40 - {"snapkv": WINDOW, "tova": 1}.get(name, 0)]
    torch.testing.assert_close(found[free], expected[free], rtol=0, atol=1e-5)
    # what must stay is rated above everything else
    assert not free.all() or name not in ("snapkv", "tova")
    assert bool((expected[~free] > expected[free].max()).all())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["streaming", "snapkv", "tova", "knorm", "observed", "keydiff"])
def test_kept_sets(name, ratio):
    count = int(array(f"n_kept_r{ratio}"))
    kept = compressed(policy(name, count), count).pos
    if name == "streaming":
        expected = array(f"streaming_scores_r{ratio}").nonzero()[:, 2].view(*kept.shape)
    else:
        expected = array(f"{name}_kept_r{ratio}")
    assert torch.equal(kept.long(), expected.long())


@pytest.mark.parametrize("name", ["streaming", "knorm"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_rerotated_keys(name, ratio):
    count = int(array(f"n_kept_r{ratio}"))
    kept = compressed(policy(name, count), count)
    found = rerotate_keys(kept.key, kept.pos, torch.arange(count), array("inv_freq"))
    torch.testing.assert_close(found, array(f"{name}_rerotated_k_r{ratio}"), rtol=0, atol=1e-5)
    if name == "streaming":
        assert torch.equal(kept.value, array(f"streaming_rerotated_v_r{ratio}"))


@pytest.mark.parametrize("ratio", RATIOS)
def test_head_adaptive_eviction(ratio):
    count = int(array(f"n_kept_r{ratio}"))
    # the file pools the scores of kvpress, whose window holds max + 1
    keep = HeadAdaptive(0.2).keep(array("snapkv_scores"), entries(), count)
    assert torch.equal(~keep, array(f"adakv_snapkv_evicted_r{ratio}"))


@pytest.mark.parametrize("ratio", RATIOS)
def test_merging_of_evicted_values(ratio):
    count = int(array(f"n_kept_r{ratio}"))
    chosen = EvictionPolicy(
        scorer=WindowAttention(WINDOW, 5), budget=count, merger=ValueMerger(), prefill="one_shot"
    )
    kept = compressed(chosen, count)
    assert torch.equal(kept.pos.long(), array(f"snapkv_kept_r{ratio}").long())
    torch.testing.assert_close(kept.value, array(f"merge_snapkv_values_r{ratio}"), rtol=0, atol=1e-5)


def test_think():
    tier = FewerChannels(window=WINDOW)
    scores = tier.channel_scores(entries(), observation())
    expected = array("think_channel_scores")
    torch.testing.assert_close(scores / expected, torch.ones_like(scores), rtol=0, atol=1e-4)
    names = [name for name in DATA.files if name.startswith("think_pruned_channels_r")]
    assert names
    for name in names:
        percent = int(name.rsplit("r", 1)[1])
        kept = kept_channels(scores, percent / 100).long()
        pruned = torch.ones_like(scores, dtype=torch.bool).scatter(-1, kept, False)
        assert torch.equal(pruned, array(name))
        zeroed = entries().key.masked_fill(pruned[:, :, None], 0)
        assert torch.equal(zeroed, array(f"think_keys_zeroed_r{percent}"))


def test_pyramid_budgets():
    names = [name for name in DATA.files if name.startswith("pyramid_") and name.endswith("_args")]
    assert names
    for name in names:
        layers, length, window, beta, ratio = array(name).tolist()
        found = pyramid(length * (1 - ratio), int(layers), int(length), int(beta), int(window))
        assert found == array(name.replace("args", "budgets")).tolist(), name
    assert PyramidBudget(64, 20, 8).layer_budgets(4, 10_000) == pyramid(64.0, 4, 10_000, 20, 8)
