"""MemoryLM keeps the promises of the layer contract over token ids."""

import copy
import subprocess
import sys

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM, ModelState

VOCAB = 23


def small_config(**changes) -> ModelConfig:
    """Full attention and a window with sinks in turn, grouped heads, a block without MLP."""
    values = {
        "vocab_size": VOCAB,
        "d_model": 12,
        "layers": [
            {"type": "attention"},
            {"type": "sliding_window", "window_size": 3, "num_sinks": 1},
            {"type": "attention", "qk_norm": True, "qkv_bias": True},
        ],
        "mixer_defaults": {"num_heads": 2, "num_kv_heads": 1},
        "mlp": [{"type": "swiglu", "d_ff": 10}, {"type": "none"}, {"type": "gelu", "d_ff": 8}],
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**values, **changes})


def small_model(dtype: torch.dtype = torch.float64, **changes) -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(small_config(**changes), dtype=dtype).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-10) -> None:
    worst = (actual - expected).abs().max().item() / expected.abs().max().clamp(min=1e-30).item()
    assert worst <= bound, f"relative error {worst:.2e} > {bound:.0e}"


def assert_states_close(actual: ModelState, expected: ModelState, bound: float = 1e-10) -> None:
    ours, theirs = dict(actual.named_tensors()), dict(expected.named_tensors())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        if tensor.numel():
            assert (tensor.double() - theirs[name].double()).abs().max() <= bound, name


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_streaming_equals_the_whole(norm, is_tied):
    model = small_model(norm=norm, tie_embeddings=is_tied)
    ids = tokens(2, 17)
    with torch.no_grad():
        whole = model(ids, return_state=True)
        state, parts = None, []
        for piece in ids.split([1, 5, 2, 9], dim=1):
            out = model(piece, state, return_state=True)
            state = out.state
            parts.append(out.logits)
        assert_close(torch.cat(parts, 1), whole.logits)
        assert_states_close(state, whole.state)

        state = model.init_state(2)
        for t in range(17):
            out = model.step(ids[:, t], state, donate=t % 2 == 1)
            state = out.state
            assert_close(out.logits, whole.logits[:, t])
        assert_states_close(state, whole.state)
        assert whole.state.num_tokens.tolist() == [17, 17]


def test_padding_anywhere_is_exact():
    model = small_model()
    ids = tokens(3, 11)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 6:] = False
    mask[2, [0, 3, 4, 8]] = False
    out = model(ids, mask=mask, return_state=True)
    for row in range(3):
        alone = model(ids[row, mask[row]][None], return_state=True)
        assert_close(out.logits[row, mask[row]], alone.logits[0])
        assert not out.logits[row, ~mask[row]].any()
        assert_states_close(out.state.select([row]), alone.state)
    last = model(ids, mask=mask, last_only=True).logits
    for row in range(3):
        assert_close(last[row], out.logits[row, mask[row]][-1])


def test_packed_sequences_do_not_meet():
    model = small_model()
    first, second = tokens(1, 6), tokens(1, 9, seed=2)
    packed = torch.cat([first, second], 1)
    out = model(packed, cu_seqlens=torch.tensor([0, 6, 15]), return_state=True)
    assert_close(out.logits[:, :6], model(first).logits)
    assert_close(out.logits[:, 6:], model(second).logits)
    assert out.state.num_tokens.tolist() == [6, 9]
    last = model(packed, cu_seqlens=torch.tensor([0, 6, 6, 15]), last_only=True).logits
    assert_close(last[0], out.logits[0, 5])
    assert not last[1].any()
    assert_close(last[2], out.logits[0, 14])


def test_causality_is_bit_exact():
    model = small_model(torch.float32)
    ids = tokens(2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    assert torch.equal(model(ids).logits[:, :7], model(changed).logits[:, :7])


def test_state_is_a_value_unless_donated():
    model = small_model()
    ids = tokens(2, 6)
    with torch.no_grad():
        state = model(ids, return_state=True).state
        kept = state.clone()
        model.step(ids[:, 0], state)
        model(ids, state, return_state=True)
        assert_states_close(state, kept, 0.0)
        model.step(ids[:, 0], state, donate=True)
        with pytest.raises(ValueError, match="donate"):
            model.step(ids[:, 0], state)


def test_declared_costs():
    model = small_model(torch.float32)
    for length in (5, 140):
        with torch.no_grad():
            state = model(tokens(2, length), return_state=True).state
        assert state.num_bytes() == model.state_num_bytes(length, 2)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.step(tokens(2), state)
    assert abs(counter.get_total_flops() / 2 / model.flops_per_token(140) - 1) < 0.05


def test_recomputation_gives_the_same_gradients():
    plain, recomputing = small_model().train(), small_model().train()
    recomputing.gradient_checkpointing = True
    ids = tokens(2, 9)
    for mask in (None, torch.arange(9) >= torch.tensor([[0], [3]])):
        for model in (plain, recomputing):
            model.zero_grad()
            model(ids, mask=mask).logits.square().sum().backward()
        expected = dict(plain.named_parameters())
        for name, parameter in recomputing.named_parameters():
            assert torch.equal(parameter.grad, expected[name].grad), name


def test_hidden_states_and_halves_of_a_block():
    model = small_model()
    ids = tokens(2, 5)
    out = model(ids, return_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert_close(model.head(out.hidden_states[-1]), out.logits)
    hidden = model.embed_tokens(ids)
    for block, expected in zip(model.blocks, out.hidden_states, strict=False):
        assert_close(hidden, expected)
        hidden = block.after_mixer(hidden, block.mixer(block.mixer_input(hidden)).hidden)
    assert_close(model.norm(hidden), out.hidden_states[-1])


def test_meta_device_deepcopy_and_tags():
    config = small_config(tie_embeddings=True)
    model = MemoryLM(config, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(4)
    model.materialize()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    tagged = {name for name, value in model.named_parameters() if getattr(value, "_no_weight_decay", False)}
    fresh = {
        name
        for name, value in MemoryLM(config).named_parameters()
        if getattr(value, "_no_weight_decay", False)
    }
    assert tagged == fresh
    assert "norm.weight" in tagged
    other = MemoryLM(config)
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 4)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_bfloat16_stays_near_float32():
    model = small_model(torch.float32)
    low = copy.deepcopy(model).to(torch.bfloat16)
    low_fp32 = MemoryLM(small_config(residual_in_fp32=True), dtype=torch.bfloat16)
    low_fp32.load_state_dict(low.state_dict())
    ids = tokens(2, 20)
    with torch.no_grad():
        exact = copy.deepcopy(low).float()(ids).logits
        errors = {}
        for name, candidate in (("bf16", low), ("fp32 residual", low_fp32)):
            logits = candidate(ids).logits
            assert logits.dtype == torch.bfloat16
            errors[name] = (logits.float() - exact).norm() / exact.norm()
    assert errors["bf16"] < 0.03
    assert errors["fp32 residual"] < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(2, 0)), "no token"),
        (lambda m: m(tokens(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool)), "no token"),
        (lambda m: m(torch.tensor([[1, VOCAB]])), f"hold {VOCAB}, but the vocabulary"),
        (lambda m: m(torch.tensor([[1, -1]])), "hold -1, but the vocabulary"),
        (lambda m: m(torch.tensor([[1.0]])), "must be integers"),
        (lambda m: m(torch.tensor([1, 2])), r"must be \(B, T\)"),
        (lambda m: m(tokens(3, 2), m.init_state(2)), "batch size 2"),
        (lambda m: m.step(tokens(2, 2), m.init_state(2)), r"shape \(N,\)"),
        (lambda m: m.step(tokens(2), None), "needs a state"),
        (lambda m: m.step(tokens(3), m.init_state(2)), "batch size 2"),
    ],
)
def test_errors_name_the_thing(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model(torch.float32))


def test_a_state_of_another_model_is_named():
    other = small_model(layers=[{"type": "attention"}], mlp={"type": "none"})
    with pytest.raises(ValueError, match="state holds 1 layers, the model has 3"):
        small_model()(tokens(1, 2), other.init_state(1))


def test_a_layer_state_of_another_model_is_named():
    other = small_model(layers=[{"type": "attention"}] * 3, mlp={"type": "none"})
    with pytest.raises(TypeError, match=r"layer 1: .* the state is of another mixer"):
        small_model()(tokens(1, 2), other.init_state(1))


def test_ids_under_the_mask_may_be_anything():
    model = small_model()
    ids = torch.tensor([[-100, 3, 4]])
    mask = torch.tensor([[False, True, True]])
    assert_close(model(ids, mask=mask).logits[:, 1:], model(ids[:, 1:]).logits)


def test_a_state_of_another_type_is_named():
    model = small_model()
    with pytest.raises(TypeError, match="ModelState"):
        model(tokens(1, 2), model.layers[0].mixer.init_state(1))


def test_state_saves_and_loads(tmp_path):
    model = small_model()
    ids = tokens(2, 9)
    with torch.no_grad():
        state = model(ids[:, :5], return_state=True).state
        state.save(tmp_path / "state.safetensors")
        loaded = ModelState.load(tmp_path / "state.safetensors")
        assert_states_close(loaded, state, 0.0)
        assert torch.equal(model(ids[:, 5:], loaded).logits, model(ids[:, 5:], state).logits)


def test_a_model_on_the_meta_device_brings_no_compiler_along():
    """The first draw on that device would: seconds, and 75 MB that no later call gives back."""
    script = (
        "import sys\n"
        "from memzoo.layers.registry import list_mixers, mixer_entry\n"
        "from memzoo.models.config import ModelConfig\n"
        "from memzoo.models.decoder import MemoryLM\n"
        "fields = {name: mixer_entry(name).config.__dataclass_fields__ for name in list_mixers()}\n"
        "layers = [{'type': name} for name in fields if 'mixers' not in fields[name]]\n"
        "defaults = {'num_heads': 2, 'head_dim': 4, 'window_size': 4}\n"
        "config = ModelConfig(vocab_size=8, d_model=8, layers=layers, mixer_defaults=defaults)\n"
        "MemoryLM(config, device='meta')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
