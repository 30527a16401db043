"""Retention gates in a bounded cache against the authors' cache and model (trimkv.md beside this file).

Bounds as the file states: kept positions exactly, logits 1e-4. In that code the newest token has age 2.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from memzoo.layers.parts.retention_gate import RetentionGate
from memzoo.layers.policies import make_policy
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache

FILE = np.load(Path(__file__).parent / "trimkv_a.npz")
BUDGET, WINDOW = int(FILE["cache_M"]), int(FILE["cache_window"])


def by_tokens(name: str) -> Tensor:
    """A stored array (B, heads, T, ...) as (B, T, heads, ...)."""
    return torch.from_numpy(FILE[name]).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [("alpha", {}), ("knorm_alpha", {"key_norm": True}), ("alpha_win", {"recent": WINDOW})],
)
def test_kept_positions(name: str, options: dict[str, object]) -> None:
    policy = make_policy({"type": "retention", "budget": BUDGET, "age_offset": 2, **options})
    q, k, v, g = (by_tokens(f"attn_{part}") for part in ("q", "k", "v", "log_beta"))
    state = policy.empty_state(2, 4, 2, 8, 8, budget=BUDGET, slots=0, device="cpu", dtype=q.dtype)
    memory = state.memory(slice(0, 2), num_seen=0, budget=BUDGET)
    kept, lengths = FILE[f"cache_{name}_kept_positions"], FILE[f"cache_{name}_len"]
    for t in range(q.shape[1]):
        token = slice(t, t + 1)
        _, memory = policy.read(memory, q[:, token], k[:, token], v[:, token], extra=g[:, token])
        found = memory.entries.pos
        assert found.shape[2] == lengths[t]
        assert found.tolist() == kept[t, :, :, : lengths[t]].tolist()


def published_model() -> Qwen3ForCausalLM:
    """The tiny model of the file, its gates in the attention layers."""
    config = Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    weights = {
        n.removeprefix("model."): torch.from_numpy(FILE[n]) for n in FILE.files if n.startswith("model.")
    }
    model.load_state_dict({n: x for n, x in weights.items() if "retention_gate" not in n})
    names = {"linear1.weight": "in_proj.weight", "linear1.bias": "in_proj.bias"}
    names |= {"linear2.weight": "out_proj.weight", "bias": "bias"}
    for index, layer in enumerate(model.model.layers):
        gate, prefix = RetentionGate(32, 2, 8, width=16), f"model.layers.{index}.self_attn.retention_gate."
        gate.load_state_dict({ours: weights[prefix + theirs] for theirs, ours in names.items()})
        layer.self_attn.retention_gate = gate
    return model


@torch.no_grad()
def test_a_model_that_forgets() -> None:
    model, ids = published_model(), torch.from_numpy(FILE["model_input_ids"])
    prefill = int(FILE["model_prefill_len"])
    whole = torch.from_numpy(FILE["model_logits_full"])
    assert float((model(ids).logits - whole).abs().max()) <= 1e-4
    policy = make_policy({"type": "retention", "budget": BUDGET, "age_offset": 2, "prefill": "one_shot"})
    cache = PolicyCache(model.config, policy)
    kept, logits = FILE["model_kept_positions"], []
    with attach_policy(model, policy):
        for step, end in enumerate(range(prefill, ids.shape[1] + 1)):
            begin = 0 if step == 0 else end - 1
            logits.append(model(ids[:, begin:end], past_key_values=cache).logits)
            for layer in range(2):
                found = cache.kept_positions(layer)[0]
                assert found.tolist() == kept[step, layer, :, : found.shape[1]].tolist()
                assert (kept[step, layer, :, found.shape[1] :] == -1).all()
    expected = torch.from_numpy(FILE["model_logits_evicting"])
    assert float((torch.cat(logits, 1) - expected).abs().max()) <= 1e-4
