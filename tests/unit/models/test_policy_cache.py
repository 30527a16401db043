"""Bounded caches under transformers models of toy size."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo.layers import build_mixer
from memzoo.layers.policies import key_norm, streaming_llm, tova
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
POLICIES = {
    "streaming_llm": streaming_llm(8),
    "rerotate": streaming_llm(8, rerotate=True, interval=2),
    "tova": tova(7, interval=3),
    "key_norm": key_norm(6, recent=2),
}


def llama(implementation="sdpa"):
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=implementation).eval()


def prompts(rows, length, seed=0):
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(*rows):
    """Prompts of one row each as a left-padded batch."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])


def logits_of(model, policy, ids, **options):
    with attach_policy(model, policy):
        cache = PolicyCache(model.config, policy)
        out = model.generate(ids, past_key_values=cache, **{**GREEDY, **options})
    return torch.stack(out.logits, dim=1), cache


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_within_the_budget_every_bit_is_the_models_own(name, implementation):
    model, ids = llama(implementation), prompts(2, 20)
    expected = torch.stack(model.generate(ids, **GREEDY).logits, dim=1)
    assert torch.equal(logits_of(model, replace(POLICIES[name], budget=40), ids)[0], expected)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", POLICIES)
def test_a_left_padded_row_gives_what_it_gives_alone(name):
    model, policy = llama(), POLICIES[name]
    rows = prompts(1, 20, seed=1), prompts(1, 11, seed=2)
    batch = padded(*rows)
    together, cache = logits_of(model, policy, batch, attention_mask=(batch > 0).long())
    for row, ids in enumerate(rows):
        alone, own = logits_of(model, policy, ids)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
        kept, mine = cache.kept_positions(1)[row], own.kept_positions(1)[0]
        assert kept.max() == ids.shape[1] + 4  # the last token was not read
        assert torch.equal(kept[:, : mine.shape[-1]], mine)


@pytest.mark.parametrize("name", POLICIES)
def test_chunks_of_any_length_give_the_same(name):
    model, policy, ids = llama(), POLICIES[name], prompts(2, 30)
    whole, cache = logits_of(model, policy, ids)
    chunked, other = logits_of(model, policy, ids, prefill_chunk_size=7)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5)
    assert torch.equal(cache.kept_positions(2), other.kept_positions(2))


def test_padded_prompts_that_fit_are_the_models_own():
    model, batch = llama(), padded(prompts(1, 12), prompts(1, 7))
    mask = (batch > 0).long()
    expected = torch.stack(model.generate(batch, attention_mask=mask, **GREEDY).logits, dim=1)
    found, _ = logits_of(model, tova(30), batch, attention_mask=mask)
    assert torch.equal(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_cache_computes_what_the_mixer_computes():
    model, policy = llama(), tova(6)
    block = model.model.layers[0].self_attn
    heads = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2}
    mixer = build_mixer({"type": "policy_attention", **heads, "policy": {"type": "tova", "budget": 6}})
    mixer.load_state_dict(block.state_dict())
    x = torch.randn(2, 25, 32, generator=torch.Generator().manual_seed(3))
    with attach_policy(model, policy), torch.no_grad():
        cache = PolicyCache(model.config, policy)
        tables = model.model.rotary_emb(x, torch.arange(25)[None])
        found, _ = block(x, position_embeddings=tables, attention_mask=None, past_key_values=cache)
        expected = mixer(x, return_state=True)
    torch.testing.assert_close(found, expected.hidden, rtol=0, atol=1e-5)
    assert torch.equal(cache.layers[0].state.order, expected.state.order)


def test_bytes_are_those_of_the_tensors_and_stay():
    model, policy = llama(), tova(8)
    sizes = []
    for length in (20, 60):
        _, cache = logits_of(model, policy, prompts(1, length))
        sizes.append(cache.memory_bytes())
    # per layer: keys, values and positions, and two counters
    assert sizes == [3 * (8 * 2 * (2 * 8 * 4 + 4) + 16)] * 2


def test_saved_and_loaded_it_goes_on(tmp_path):
    model, policy, ids = llama(), tova(8, interval=2), prompts(2, 21)
    with attach_policy(model, policy), torch.no_grad():
        cache = PolicyCache(model.config, policy)
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "prompt.safetensors")
        expected = model(ids[:, :4], past_key_values=cache).logits
        other = PolicyCache(model.config, policy).load(tmp_path / "prompt.safetensors")
        assert other.get_seq_length() == 21
        assert torch.equal(model(ids[:, :4], past_key_values=other).logits, expected)
    with pytest.raises(ValueError, match="written under the policy"):
        PolicyCache(model.config, tova(9)).load(tmp_path / "prompt.safetensors")


def test_beams_reorder_the_cache():
    model, policy, ids = llama(), tova(8), prompts(1, 20)
    with attach_policy(model, policy), torch.no_grad():
        cache = PolicyCache(model.config, policy)
        model(ids.repeat(3, 1), past_key_values=cache)
        model(torch.tensor([[3], [4], [5]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        logits = model(torch.full((3, 1), 7), past_key_values=cache).logits
        beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5}
        found = model.generate(ids, past_key_values=PolicyCache(model.config, policy), **beams)
    assert found.shape == (1, 25)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_wrong_uses_are_refused():
    model, policy, ids = llama(), tova(8), prompts(1, 5)
    with pytest.raises(ValueError, match="with attach_policy"):
        model(ids, past_key_values=PolicyCache(model.config, policy))
    with attach_policy(model, policy):
        with pytest.raises(ValueError, match="the cache is DynamicCache"):
            model(ids, past_key_values=DynamicCache(config=model.config))
        with pytest.raises(ValueError, match="Pass past_key_values"):
            model(ids, past_key_values=PolicyCache(model.config, tova(9)))
        cache = PolicyCache(model.config, policy)
        with pytest.raises(ValueError, match="Read a prompt first"):
            cache.kept_positions(0)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="cannot be cut back"):
            cache.crop(-1)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="serves models with sdpa or eager"), attach_policy(model, policy):
        pass
