"""Policies of a bounded cache against their definitions."""

import re

import pytest
import torch

from memzoo.layers import build_mixer
from memzoo.layers.policies import PRESETS, Entries, EvictionPolicy, Recency, make_policy, rerotate_keys

HEADS = {"d_model": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def mixer(policy, **fields):
    torch.manual_seed(0)
    return build_mixer({"type": "policy_attention", **HEADS, **fields, "policy": policy}).double()


def full_attention(layer):
    """Attention over everything, with the weights of another layer."""
    full = build_mixer({"type": "attention", **HEADS, "rope_theta": layer.config.rope_theta}).double()
    full.load_state_dict(layer.state_dict())
    return full


def tokens(batch, length):
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(layer, x):
    with torch.no_grad():
        return layer(x, return_state=True)


def test_streaming_llm_is_a_window_with_sinks():
    layer = mixer({"type": "streaming_llm", "budget": 7, "n_sink": 2})
    # a token sees the 7 entries held and itself
    window = build_mixer({"type": "sliding_window", **HEADS, "window_size": 6, "num_sinks": 2}).double()
    window.load_state_dict(layer.state_dict())
    x = tokens(2, 40)
    torch.testing.assert_close(layer(x).hidden, window(x).hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["streaming_llm", "tova", "key_norm"])
def test_within_the_budget_it_is_attention(name):
    layer, x = mixer({"type": name, "budget": 30}), tokens(2, 30)
    torch.testing.assert_close(layer(x).hidden, full_attention(layer)(x).hidden, rtol=0, atol=1e-12)


def test_rerotated_positions_are_ranks():
    layer = mixer({"type": "streaming_llm", "budget": 5, "n_sink": 2, "rerotate": True})
    x = tokens(1, 12)
    # all that the last token sees, as a short text of its own; of one layer, keys know nothing of their past
    expected = full_attention(layer)(x[:, [0, 1, 8, 9, 10, 11]]).hidden[0, -1]
    torch.testing.assert_close(layer(x).hidden[0, -1], expected, rtol=0, atol=1e-12)


def test_rerotate_keys_undoes_itself():
    key = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    old, new = torch.arange(5) * 7, torch.arange(5)
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    turned = rerotate_keys(key, old, new, frequencies)
    assert not torch.allclose(turned, key)
    torch.testing.assert_close(rerotate_keys(turned, new, old, frequencies), key)


def test_tova_keeps_what_the_last_query_attends_to():
    layer, x = mixer({"type": "tova", "budget": 4, "interval": 9}, rope_theta=None), tokens(1, 9)
    state = read(layer, x).state
    q, k = layer.q_proj(x).unflatten(-1, (4, 6)), layer.k_proj(x).unflatten(-1, (2, 6))
    logits = torch.einsum("hd,jhd->hj", q[0, -1], k[0].repeat_interleave(2, dim=1)) / 6**0.5
    mean = logits.softmax(-1).mean(0)
    mean[-1] = torch.inf
    kept = mean.topk(4).indices.sort().values
    assert torch.equal(state.order[0, :4].long() - 1, kept[:, None].expand(4, 2))


def test_key_norm_keeps_small_keys():
    layer, x = mixer({"type": "key_norm", "budget": 4, "interval": 9}, rope_theta=None), tokens(1, 9)
    state = read(layer, x).state
    norm = layer.k_proj(x).unflatten(-1, (2, 6))[0].norm(dim=-1)  # (9, 2)
    kept = norm.topk(4, dim=0, largest=False).indices.sort(dim=0).values
    assert torch.equal(state.order[0, :4].long() - 1, kept)


def test_of_equal_scores_the_earlier_stays():
    zeros, order = torch.zeros(1, 1, 5, 2), torch.arange(1, 6, dtype=torch.int32).expand(1, 1, 5)
    index, _ = EvictionPolicy(scorer=Recency(), budget=3).select(
        torch.zeros(1, 1, 5), Entries(zeros, zeros, order), 3
    )
    assert index.tolist() == [[[0, 1, 2]]]


def test_gradients_reach_the_tokens_held_and_no_others():
    layer, x = mixer({"type": "key_norm", "budget": 4}), tokens(1, 12).requires_grad_()
    layer(x).hidden[0, -1].sum().backward()
    touched = (x.grad[0].abs().sum(-1) > 0).nonzero().flatten()
    held = read(layer, x[:, :-1]).state.order[0, :4].flatten() - 1
    assert set(touched.tolist()) == set(held.tolist()) | {11}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"type": "tovaa", "budget": 4}, "Did you mean 'tova'"),
        ({"type": "tova", "bugdet": 4}, "Did you mean 'budget'"),
        ({"type": "tova"}, "needs ['budget']"),
        ({"budget": 4}, "with a type"),
        ({"type": "tova", "budget": 0}, "at least 1"),
        ({"type": "tova", "budget": 4, "interval": 0}, "interval must be at least 1"),
        ({"type": "streaming_llm", "budget": 5}, "budget of 5 entries is too small for 4 sinks"),
        ({"type": "key_norm", "budget": 5, "recent": 4, "sinks": 2}, "too small for 2 sinks and 4 recent"),
    ],
)
def test_errors_say_what_is_wrong(policy, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_policy(policy)


def test_a_policy_is_taken_as_it_is():
    policy = PRESETS["tova"](4)
    assert make_policy(policy) is policy
