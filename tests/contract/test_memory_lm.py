"""Every registered mixer inside `MemoryLM`: the contract over token ids, and generation."""

import random

import pytest
import torch

from memzoo.layers import list_mixers
from memzoo.layers.registry import mixer_entry
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM, ModelState
from memzoo.models.hf import MemoryConfig, MemoryForCausalLM
from memzoo.testing import assert_close, assert_states_close, scatter_parameters, small_configs

VOCAB = 29
# mixers that need more than token ids, or may be cut only at certain places, have tests of their own
NAMES = [
    name
    for name in list_mixers()
    if not mixer_entry(name).mixer.needs and mixer_entry(name).mixer.exact == "token"
]
SUBJECTS = [(name, index) for name in NAMES for index in (0, 1)]


def small_model_config(name: str, index: int) -> ModelConfig:
    """The mixer in two blocks, one with and one without MLP."""
    entry = dict(small_configs(name)[index])
    d_model = entry.pop("d_model")
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=d_model,
        layers=[entry, entry],
        mlp=[{"type": "swiglu", "d_ff": 8}, {"type": "none"}],
        initializer_range=0.3,
    )


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SUBJECTS, ids=lambda subject: f"{subject[0]}-{subject[1]}")
def model(request) -> MemoryLM:
    torch.manual_seed(0)
    built = MemoryLM(small_model_config(*request.param), dtype=torch.float64).eval()
    for block in built.blocks:
        scatter_parameters(block.mixer, seed=2)
    return built


@torch.no_grad()
def test_streaming_padding_and_packing(model):
    length = max(4 * model.blocks[0].mixer.span + 3, 17)
    ids = tokens(2, length)
    whole = model(ids, return_state=True)
    dice = random.Random(3)
    for _ in range(3):
        cuts = sorted({0, length, *(dice.randrange(length) for _ in range(4))})
        state, parts = None, []
        for start, end in zip(cuts, cuts[1:], strict=False):
            out = model(ids[:, start:end], state, return_state=True)
            state, parts = out.state, [*parts, out.logits]
        assert_close("logits", torch.cat(parts, 1), whole.logits, 1e-10)
        assert_states_close("state", state, whole.state, 1e-10)
    state = model.init_state(2)
    for t in range(length):
        out = model.step(ids[:, t], state, donate=True)
        state = out.state
        assert_close(f"step {t}", out.logits, whole.logits[:, t], 1e-10)
    assert_states_close("state of steps", state, whole.state, 1e-10)

    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[:, 0] = torch.tensor([True, False])
    padded = model(ids, mask=mask, return_state=True)
    rows = [ids[row, mask[row]] for row in range(2)]
    bounds = torch.tensor([0, len(rows[0]), len(rows[0]) + len(rows[1])])
    packed = model(torch.cat(rows)[None], cu_seqlens=bounds, return_state=True)
    assert_states_close("packed", packed.state, padded.state, 1e-10)
    for row in range(2):
        alone = model(rows[row][None], return_state=True)
        assert_close("padded", padded.logits[row, mask[row]], alone.logits[0], 1e-10)
        assert_close("packed", packed.logits[0, bounds[row] : bounds[row + 1]], alone.logits[0], 1e-10)
        assert_states_close("row", padded.state.select([row]), alone.state, 1e-10)


@torch.no_grad()
def test_costs_and_saved_states(model, tmp_path):
    model = model.float()
    state = model(tokens(2, 40), return_state=True).state
    measured, declared = state.num_bytes(), model.state_num_bytes(40, 2)
    is_bound = any(block.mixer.data_dependent for block in model.blocks)
    assert measured <= declared if is_bound else measured == declared
    assert model.flops_per_token(40) > 0
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors")
    following = tokens(2, 3, seed=4)
    assert torch.equal(model(following, loaded).logits, model(following, state).logits)


def test_the_wrapper_generates_and_survives_saving(model, tmp_path):
    wrapped = MemoryForCausalLM.from_model(model.float(), eos_token_id=2, pad_token_id=0, bos_token_id=1)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :5], mask[0, :5] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12}
    greedy = wrapped.generate(ids, **options)
    assert torch.equal(greedy, wrapped.generate(ids, use_cache=False, **options))
    beams = wrapped.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, wrapped.generate(ids, num_beams=3, use_cache=False, **options))
    alone = wrapped.generate(ids[:1, 5:], max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(greedy[0, 9:], alone[0, 4:])
    wrapped.save_pretrained(tmp_path)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    assert MemoryConfig.from_pretrained(tmp_path).model == model.config
    assert torch.equal(loaded.generate(ids, **options), greedy)
