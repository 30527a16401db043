"""SentenceKV against a loop over tokens that follows its definition."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from memzoo.layers.policies import KeyNorm, ThreeStates, make_policy

# B 2, G 2 key/value heads of 2 query heads each, D 6
PROMPT, LENGTH = 30, 48
SIZES = {"budget": 9, "start": 2, "recent": 3, "factor": 2, "window": 4, "kernel": 3}
GIVEN = {"type": "sentencekv", "boundary_ids": [0], **SIZES}


def tokens():
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, LENGTH, 4, 6, generator=made, dtype=torch.float64)
    k, v = torch.randn(2, 2, LENGTH, 2, 6, generator=made, dtype=torch.float64)
    return q, k, v, torch.rand(2, LENGTH, generator=made) < 0.2


def attention(query, key):
    return (query @ key.T / 6**0.5).softmax(-1)


def preselected(query, key):
    """Positions of a prompt that one head keeps, from queries (T, R, D) and keys (T, D)."""
    mass = torch.zeros(PROMPT - SIZES["window"], dtype=torch.float64)
    for head in range(2):
        total = sum(
            F.pad(attention(query[t, head], key[: t + 1]), (0, PROMPT - t - 1))
            for t in range(PROMPT - SIZES["window"], PROMPT)
        )
        mass += F.max_pool1d(total[None, None, : -SIZES["window"]], 3, 1, 1)[0, 0]
    room = SIZES["factor"] * SIZES["budget"] - SIZES["window"]
    best = mass.sort(descending=True, stable=True).indices[:room]  # of equal ones the earlier stays
    return [*sorted(best.tolist()), *range(PROMPT - SIZES["window"], PROMPT)]


def expected(query, key, ends):
    """What one head reads at every token after the prompt."""
    held = preselected(query, key)
    bounds = [0, *(t + 1 for t in range(PROMPT) if ends[t])]
    buckets = [
        [i for i in held if first <= i < last]
        for first, last in zip(bounds, [*bounds[1:], PROMPT], strict=True)
    ]
    open_sentence, found = [], []
    for t in range(PROMPT, LENGTH):
        held.append(t)
        open_sentence.append(t)
        if ends[t]:
            buckets.append(open_sentence)
            open_sentence = []
        if len(open_sentence) <= 1:
            found.append(list(held))
            continue
        question = query[open_sentence].mean((0, 1))
        near = held[: SIZES["start"]] + held[-SIZES["recent"] :]
        full = [bucket for bucket in buckets if bucket]
        full.sort(key=lambda bucket: -float(key[bucket].mean(0) @ question))
        others = [i for bucket in full for i in bucket if i not in near]
        found.append(near + others[: SIZES["budget"] - len(near)])
    return found


@pytest.mark.parametrize("rows", [[0, 1], [1]])
def test_single_tokens_read_the_sentences_they_ask_for(rows):
    policy = make_policy(GIVEN)
    q, k, v, ends = (x[rows] for x in tokens())
    state = policy.empty_state(
        len(rows), 4, 2, 6, 6, budget=policy.budget, slots=0, device="cpu", dtype=q.dtype
    )
    memory = state.memory(slice(0, len(rows)), num_seen=0, budget=policy.budget)
    parts = [slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, LENGTH))]
    outputs = []
    for part in parts:
        out, memory = policy.read(memory, q[:, part], k[:, part], v[:, part], ends=ends[:, part])
        outputs.append(out)
    found, sizes = torch.cat(outputs[1:], dim=1), set()
    for row in range(len(rows)):
        for group in range(2):
            query, key, value = q[row].unflatten(1, (2, 2))[:, group], k[row, :, group], v[row, :, group]
            for t, read in enumerate(expected(query, key, ends[row].tolist())):
                sizes.add(len(read))
                wanted = torch.stack(
                    [attention(query[PROMPT + t, head], key[read]) @ value[read] for head in range(2)]
                )
                own = found[row, t].unflatten(0, (2, 2))[group]
                torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)
    assert SIZES["budget"] in sizes
    assert max(sizes) > policy.budget  # nothing leaves after the prompt
    assert memory.entries.num_slots == policy.budget + LENGTH - PROMPT


def test_it_goes_with_other_scorers_and_budgets():
    policy = replace(make_policy(GIVEN), scorer=KeyNorm(), recent=0, sinks=2)
    q, k, v, ends = tokens()
    state = policy.empty_state(2, 4, 2, 6, 6, budget=12, slots=0, device="cpu", dtype=q.dtype)
    memory = state.memory(slice(0, 2), num_seen=0, budget=12)
    _, memory = policy.read(memory, q[:, :PROMPT], k[:, :PROMPT], v[:, :PROMPT], ends=ends[:, :PROMPT])
    assert memory.entries.num_slots == 12
    norm = k[:, :PROMPT].norm(dim=-1).masked_fill((torch.arange(PROMPT) < 2)[:, None], 0).transpose(1, 2)
    kept = norm.topk(12, largest=False).indices.sort(-1).values
    assert torch.equal(memory.entries.pos.long(), kept)
    before = (ends.cumsum(1) - ends.long())[:, None].expand(2, 2, -1)
    assert torch.equal(memory.entries.sentence.long(), before.gather(-1, kept) + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boundary_ids": []}, "boundary_ids is empty"),
        ({"start": 6}, "leaves no room for sentences beside the first 6 and the last 3"),
        ({"factor": 1, "window": 9}, "larger than the observation window of 9"),
    ],
)
def test_errors_say_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_policy({**GIVEN, **changes})


def test_wrong_uses_are_refused():
    policy = make_policy(GIVEN)
    with pytest.raises(ValueError, match="which a tier does not keep"):
        replace(policy, tier=ThreeStates(20))
    with pytest.raises(ValueError, match="needs the whole prompt"):
        replace(policy, prefill="grid")
    q, k, v, _ = tokens()
    state = policy.empty_state(2, 4, 2, 6, 6, budget=18, slots=0, device="cpu", dtype=q.dtype)
    with pytest.raises(ValueError, match="wants `ends`"):
        policy.read(state.memory(slice(0, 2), num_seen=0, budget=18), q, k, v)
