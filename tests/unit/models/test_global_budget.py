"""One budget for all heads of all layers of a transformers model."""

import math
import re

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo.layers.parts.retention_gate import RetentionGate
from memzoo.layers.policies import EvictionPolicy, GlobalBudget, KeyNorm, kv_bytes, make_policy
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache

LAYERS, HEADS, BUDGET, PROMPT = 3, 2, 8, 20
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


def by_norm(floor=0.0, budget=BUDGET, **options):
    return EvictionPolicy(
        scorer=KeyNorm(), budget=budget, selector=GlobalBudget(floor), prefill="one_shot", **options
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM._from_config(CONFIG).eval()
    for index, layer in enumerate(made.model.layers):
        layer.self_attn.k_proj.weight.data *= 1 + 0.15 * index  # small keys stay: those of lower layers
    return made.requires_grad_(False)


def prompt(length, seed=0, rows=1):
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, policy, parts, masks=None):
    """Logits of the last token of each part, and the cache."""
    found, cache = [], PolicyCache(model.config, policy)
    with attach_policy(model, policy):
        for index, part in enumerate(parts):
            mask = None if masks is None else masks[index]
            place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
            out = model(part, attention_mask=mask, position_ids=place, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1), cache


def kept(cache, row=0):
    """Positions held, by layer and head."""
    return [
        [[p for p in head if p >= 0] for head in cache.kept_positions(i)[row].tolist()] for i in range(LAYERS)
    ]


def size(positions):
    return sum(len(head) for layer in positions for head in layer)


def expected(keys, recent, floor):
    """What is kept of keys (G, T, D) of every layer, as lists."""
    least = int(BUDGET * floor)
    rated = {}
    for index, layer in enumerate(keys):
        for head in range(HEADS):
            norms = layer[head].norm(dim=-1).tolist()
            late = len(norms) - recent
            rated[index, head] = [(-1.0 if t >= late else n, t) for t, n in enumerate(norms)]
    pool = sorted((n, place, t) for place, rows in rated.items() for n, t in rows)
    best = [place for _, place, _ in pool[: LAYERS * HEADS * (BUDGET - least)]]
    return [
        [
            sorted(t for _, t in sorted(rated[index, head])[: best.count((index, head)) + least])
            for head in range(HEADS)
        ]
        for index in range(LAYERS)
    ]


@pytest.mark.parametrize(("floor", "recent"), [(0.0, 0), (0.0, 3), (0.5, 2)])
def test_the_best_of_all_layers_stay(model, floor, recent):
    policy, ids, full = by_norm(floor, recent=recent), prompt(PROMPT), DynamicCache(config=CONFIG)
    model(ids, past_key_values=full)
    _, cache = read(model, policy, [ids])
    found = kept(cache)
    assert found == expected([layer.keys[0] for layer in full.layers], recent, floor)
    assert size(found) == LAYERS * HEADS * BUDGET
    lengths = [len(head) for layer in found for head in layer]
    assert max(lengths) > BUDGET > min(lengths) >= max(recent, int(BUDGET * floor))
    assert cache.memory_bytes() == kv_bytes(CONFIG, PROMPT, policy)


def test_single_tokens_push_out_the_worst_of_all_layers(model):
    policy, tokens = by_norm(recent=2, interval=2), prompt(6, seed=1)
    before = None
    for steps in range(1, 7):
        _, cache = read(model, policy, [prompt(PROMPT), *tokens[:, :steps].split(1, dim=1)])
        found, due = kept(cache), (PROMPT + steps) % 2 == 0
        assert size(found) == LAYERS * HEADS * (BUDGET + (not due))
        if before is not None:  # what is gone stays gone
            for old, new in zip(before, found, strict=True):
                for head in range(HEADS):
                    assert set(new[head]) <= {*old[head], PROMPT + steps - 1}
        before = found


def test_a_left_padded_row_gives_what_it_gives_alone(model):
    policy, rows, tokens = by_norm(0.25, recent=2), (prompt(PROMPT, 2), prompt(13, 3)), prompt(5, 4)
    batch = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (7, 0))])
    parts = [batch, *tokens[:, :2].expand(2, -1).split(1, dim=1), tokens[:, 2:].expand(2, -1)]
    masks, mask = [], (batch > 0).long()
    for part in parts:
        mask = mask if part is batch else torch.cat([mask, torch.ones_like(part)], dim=1)
        masks.append(mask)
    together, cache = read(model, policy, parts, masks)
    for row, ids in enumerate(rows):
        alone, own = read(model, policy, [ids, *(part[:1] for part in parts[1:])])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
        assert kept(cache, row) == kept(own)
    same, cache = read(model, policy, [prompt(PROMPT, 5, rows=2), *parts[1:]])
    assert size(kept(cache, 1)) == LAYERS * HEADS * BUDGET
    torch.testing.assert_close(
        same[1], read(model, policy, [prompt(PROMPT, 5, rows=2)[1:], *(p[1:] for p in parts[1:])])[0][0]
    )


def test_within_the_budget_every_bit_is_the_models_own(model):
    parts = [prompt(9), *prompt(5, 1).split(1, dim=1)]
    full, own = DynamicCache(config=CONFIG), []
    for part in parts:
        own.append(model(part, past_key_values=full).logits[:, -1])
    assert torch.equal(read(model, by_norm(budget=14), parts)[0], torch.stack(own, dim=1))


def test_gates_share_the_budget_of_the_model(model):
    torch.manual_seed(1)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.retention_gate = RetentionGate(32, HEADS, 8, width=6, bias_init=1.0 + index).eval()
    try:
        policy = make_policy({"type": "retention", "budget": BUDGET, "scope": "global", "floor": 0.25})
        _, cache = read(model, policy, [prompt(PROMPT), *prompt(4, 1).split(1, dim=1)])
        found = [size([layer]) for layer in kept(cache)]
        assert sum(found) == LAYERS * HEADS * BUDGET
        assert found == sorted(found)  # higher layers forget less
        assert found[0] < found[2]
        limits = {"type": "retention", "scope": "global", "threshold": 0.5}
        chosen = make_policy({**limits, "budget": 40})
        _, cache = read(model, chosen, [prompt(PROMPT)])
        for layer in cache.layers:  # what is less than half there is gone
            entries = layer.state
            age = PROMPT - entries.order
            assert bool((entries.extra * age >= math.log(0.5))[entries.order > 0].all())
        assert 0 < size(kept(cache)) < LAYERS * HEADS * PROMPT
        with_floor = make_policy({**limits, "budget": BUDGET, "floor": 0.5})
        _, cache = read(model, with_floor, [prompt(PROMPT)])
        assert min(len(head) for layer in kept(cache) for head in layer) >= BUDGET // 2
        of_layers = make_policy(
            {"type": "retention", "budget": BUDGET, "scope": "layer", "prefill": "one_shot"}
        )
        _, cache = read(model, of_layers, [prompt(PROMPT)])
        assert [size([layer]) for layer in kept(cache)] == [HEADS * BUDGET] * LAYERS
    finally:
        for layer in model.model.layers:
            del layer.self_attn.retention_gate


@pytest.mark.parametrize(("method", "length"), [("snapkv", 9), ("global", 10)])
def test_a_second_prompt_sees_no_empty_slots(model, method, length):
    sizes = {"budget": BUDGET, "window": 2, "adaptive": True, "prefill": "one_shot"}
    policy = by_norm() if method == "global" else make_policy({"type": "snapkv", **sizes})
    first, second = prompt(length, 8), prompt(4, 7)
    held = kept(read(model, policy, [first])[1])
    # one head has all tokens, another of its layer has lost some
    assert any(max(map(len, layer)) == length > min(map(len, layer)) for layer in held)
    plain, _ = read(model, policy, [first, second])
    # a padded row never takes the model's own attention
    masks = [torch.cat([torch.zeros(1, 1), torch.ones(1, n)], dim=1).long() for n in (length, length + 4)]
    padded, _ = read(model, policy, [torch.nn.functional.pad(first, (1, 0)), second], masks)
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: by_norm(1.5), "floor must lie in [0, 1]"),
        (
            lambda: make_policy({"type": "retention", "budget": 8, "threshold": 0.5}),
            "a threshold goes with the scope global, got head",
        ),
        (lambda: GlobalBudget(threshold=0.0), "threshold must lie in (0, 1]"),
        (lambda: by_norm(0.5, recent=5), "has no room for 5 sinks and recent tokens"),
        (lambda: by_norm(share_layers=2), "shares one budget among all layers"),
        (
            lambda: make_policy({"type": "retention", "budget": 8, "scope": "global", "prefill": "grid"}),
            "compares layers, which read a call one after another",
        ),
        (lambda: make_policy({"type": "retention", "budget": 8, "scope": "model"}), "scope"),
    ],
)
def test_errors_say_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
