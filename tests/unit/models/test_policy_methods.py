"""Every method in a transformers model of toy size: rows, bytes, stored and packed entries."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo.layers.policies import kv_bytes, make_policy
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
METHODS = {
    "streaming_llm": {"budget": 12, "prefill": "one_shot"},
    "h2o": {"budget": 12},
    "h2o, merged": {"budget": 12, "merge": True, "prefill": "one_shot"},
    "snapkv": {"budget": 14, "window": 4, "prefill": "one_shot"},
    "snapkv, adaptive": {"budget": 14, "window": 4, "adaptive": True, "prefill": "one_shot"},
    "pyramidkv": {"budget": 14, "window": 2, "beta": 4},
    "tova": {"budget": 12, "prefill": "one_shot"},
    "key_norm": {"budget": 12, "sinks": 2, "prefill": "one_shot"},
    "keydiff": {"budget": 12},
    "d2o": {"hh_ratio": 0.25, "recent_ratio": 0.15, "n_sink": 2, "skip_layers": [0]},
    "kvmerger": {"budget": 14, "sinks": 2, "skip_layers": [0], "prefill": "one_shot"},
    "think": {"ratio": 0.5, "window": 4, "recent": 6},
    "mikv": {"importance": 0.25, "lo_bits": 4, "recent": 4},
    "arkv": {"cache_size": 14, "window": 4},
    "compresskv": {"budget": 14, "heads": [[0, 2]] * 5, "window": 4},
    "sentencekv": {
        "budget": 10,
        "boundary_ids": list(range(2, 20)),
        "start": 2,
        "recent": 3,
        "factor": 2,
        "window": 4,
        "kernel": 3,
    },
    "windowkv": {"budget": 12, "window": 4, "suffix": 4, "group": 2, "beta": 4},
    "elastic_cache": {"budget": 30},
}
EXACT = (
    "streaming_llm",
    "h2o",
    "snapkv",
    "snapkv, adaptive",
    "pyramidkv",
    "tova",
    "key_norm",
    "keydiff",
    "think",
    "mikv",
    "arkv",
    "sentencekv",
)
RAGGED = ("kvmerger", "windowkv")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(CONFIG).eval()


def policy(name):
    return make_policy({"type": name.partition(",")[0], **METHODS[name]})


def prompt(length, seed):
    return torch.randint(2, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def read(model, chosen, ids, steps, mask=None):
    """Logits after a prompt and after each of some further tokens; the cache; its bytes after the prompt."""
    with attach_policy(model, chosen), torch.no_grad():
        cache = PolicyCache(model.config, chosen)
        found = [
            model(ids, attention_mask=mask, past_key_values=cache, position_ids=positions(mask)).logits[:, -1]
        ]
        size = cache.memory_bytes()
        for token in steps.unbind(1):
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            last = None if mask is None else positions(mask)[:, -1:]
            out = model(token[:, None], attention_mask=mask, past_key_values=cache, position_ids=last)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1), cache, size


def positions(mask):
    return None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", METHODS)
def test_rows_padding_and_bytes(model, name):
    chosen = policy(name)
    rows, steps = (prompt(40, 1), prompt(33, 2)), prompt(6, 3)
    batch = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (7, 0))])
    together, cache, _ = read(model, chosen, batch, steps.expand(2, -1), (batch > 0).long())
    plain = model(rows[0]).logits[:, -1]
    for row, ids in enumerate(rows):
        alone, own, size = read(model, chosen, ids, steps)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
        if row == 0:
            expected = kv_bytes(CONFIG, 40, chosen)
            if name in EXACT:
                assert size == expected
            elif name in RAGGED:
                assert size <= expected
            if chosen.prefill == "one_shot":
                # a prompt is read with full attention
                torch.testing.assert_close(alone[:, 0], plain, rtol=0, atol=1e-5)
            # and then something is missing
            assert not torch.allclose(
                alone[:, -1], model(torch.cat([ids, steps], 1)).logits[:, -1], atol=1e-6
            )
        for index in (2, 4):
            kept, mine = cache.kept_positions(index)[row], own.kept_positions(index)[0]
            assert torch.equal(kept[:, : mine.shape[-1]], mine)
            assert bool((kept[:, mine.shape[-1] :] == -1).all())


@pytest.mark.parametrize("name", ["d2o", "think", "mikv", "arkv", "windowkv", "sentencekv"])
def test_saved_caches_go_on(model, name, tmp_path):
    chosen, ids, steps = policy(name), prompt(40, 4), prompt(3, 5)
    if chosen.skip_layers:
        chosen = make_policy({**METHODS[name], "type": name, "skip_layers": []})
    _, cache, _ = read(model, chosen, ids, steps)
    cache.save(tmp_path / "cache.safetensors")
    other = PolicyCache(model.config, chosen).load(tmp_path / "cache.safetensors")
    assert other.memory_bytes() == cache.memory_bytes()
    with attach_policy(model, chosen), torch.no_grad():
        found = [model(steps[:, :1], past_key_values=each).logits for each in (cache, other)]
    assert torch.equal(*found)


def test_layers_share_a_choice(model):
    _, cache, _ = read(model, policy("windowkv"), prompt(40, 6), prompt(5, 7))
    first, second = cache.kept_positions(0), cache.kept_positions(1)
    assert torch.equal(first, second)
    assert first.shape != cache.kept_positions(2).shape or not torch.equal(first, cache.kept_positions(2))


def test_layers_of_unequal_budgets(model):
    _, cache, _ = read(model, policy("pyramidkv"), prompt(60, 8), prompt(2, 9))
    held = [cache.kept_positions(layer).shape[-1] for layer in range(5)]
    assert held == sorted(held, reverse=True)
    assert held[0] > held[-1]
    assert abs(sum(held) - 5 * 14) <= 2


def test_eight_bits_and_channels_come_close(model):
    ids, steps = prompt(40, 10), prompt(4, 11)
    full = model(torch.cat([ids, steps], dim=1)).logits[:, 39:]
    errors = {}
    for bits in (2, 4, 8):
        chosen = make_policy({"type": "mikv", "importance": 0.25, "lo_bits": bits, "recent": 4})
        errors[bits] = float((read(model, chosen, ids, steps)[0] - full).abs().max())
    assert errors[8] < errors[4] < errors[2]
    assert errors[8] < 1e-2
    chosen = make_policy({"type": "think", "ratio": 0.0, "recent": 4})
    torch.testing.assert_close(read(model, chosen, ids, steps)[0], full, rtol=0, atol=1e-5)


def test_sentences_need_token_ids_and_room(model):
    chosen, ids, steps = policy("sentencekv"), prompt(20, 12), prompt(6, 13)
    wide = make_policy({**METHODS["sentencekv"], "type": "sentencekv", "budget": 30})
    found, cache, _ = read(model, wide, ids, steps)
    plain, own = DynamicCache(config=CONFIG), []
    with torch.no_grad():
        for part in (ids, *steps.split(1, dim=1)):
            own.append(model(part, past_key_values=plain).logits[:, -1])
    assert torch.equal(found, torch.stack(own, dim=1))
    assert cache.kept_positions(0).shape[-1] == 26
    embedded = model.get_input_embeddings()(ids)
    with attach_policy(model, chosen), pytest.raises(ValueError, match="tells sentences apart by token ids"):
        model(inputs_embeds=embedded, past_key_values=PolicyCache(CONFIG, chosen))
