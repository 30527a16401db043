"""`memzoo.swap`: our mixers inside a plain transformers model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from memzoo.models.swap import MemoryCacheLayer, swap

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def plain(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of unequal length, padded on the left."""
    ids = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("layers", [[0], [1], [0, 1, 2]])
@pytest.mark.parametrize("mixer", [{"type": "attention"}, {"type": "sliding_window", "window_size": 64}])
def test_an_equal_mixer_changes_nothing(layers: list[int], mixer: dict) -> None:
    original, swapped = plain(), swap(plain(), dict.fromkeys(layers, mixer))
    ids, mask = prompts()
    with torch.no_grad():
        torch.testing.assert_close(swapped(ids).logits, original(ids).logits, atol=1e-5, rtol=0)
        real = mask.bool()
        ours = swapped(ids, attention_mask=mask).logits[real]
        torch.testing.assert_close(ours, original(ids, attention_mask=mask).logits[real], atol=1e-5, rtol=0)
        for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            settings = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0, **options}
            assert torch.equal(swapped.generate(ids, **settings), original.generate(ids, **settings))


def test_takes_over_head_norms() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, head_dim=6)
    original = Qwen3ForCausalLM(config).eval()
    torch.manual_seed(0)
    swapped = swap(Qwen3ForCausalLM(config).eval(), {1: {"type": "attention"}})
    ids, _ = prompts()
    with torch.no_grad():
        torch.testing.assert_close(swapped(ids).logits, original(ids).logits, atol=1e-5, rtol=0)


def test_cached_generation_equals_reading_everything_again() -> None:
    swapped = swap(
        plain(),
        {
            0: {"type": "sliding_window", "window_size": 5, "num_sinks": 2},
            2: {"type": "lolcats", "window_size": 6, "feature_dim": 4},
        },
    )
    ids, mask = prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    cached = swapped.generate(ids, **settings)
    assert torch.equal(cached, swapped.generate(ids, use_cache=False, **settings))
    for row in range(2):
        alone = swapped.generate(
            ids[row][mask[row].bool()][None], max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert torch.equal(alone[0, -24:], cached[row, -24:])


def test_gradients_reach_the_swapped_mixer() -> None:
    swapped = swap(plain(), {1: {"type": "based", "num_heads": 4, "feature_dim": 4}}).train()
    ids, _ = prompts()
    swapped(ids, labels=ids).loss.backward()
    assert swapped.model.layers[1].self_attn.mixer.q_proj.weight.grad.abs().sum() > 0


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        swap(plain(), {7: {"type": "attention"}})
    with pytest.raises(ValueError, match="layer '0' does not exist"):
        swap(plain(), {"0": {"type": "attention"}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="has d_model=8, the model has"):
        swap(plain(), {0: {"type": "base_conv", "d_model": 8}})
    with pytest.raises(ValueError, match="Did you mean 'sliding_window'"):
        swap(plain(), {0: {"type": "sliding_windows"}})
    with pytest.raises(ValueError, match=r"model\.model\.layers"):
        swap(torch.nn.Linear(2, 2), {0: {"type": "attention"}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be cut back"):
        MemoryCacheLayer().crop(3)


def test_a_failed_swap_leaves_the_model_alone() -> None:
    model = plain()
    with pytest.raises(ValueError):
        swap(model, {0: {"type": "attention"}, 9: {"type": "attention"}})
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
