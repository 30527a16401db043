"""Memory as context, gate and layer: what they compute, against their definitions, and what they refuse."""

import pytest
import torch
from torch import Tensor

from memzoo.layers import TokenMixer, build_mixer, probe
from memzoo.layers.parts.rotary import Rotary
from memzoo.testing import assert_close, scatter_parameters

WIDTH, SIZE, PERSISTENT = 8, 4, 3
MEMORY = {"type": "titans", "num_heads": 2, "chunk_size": SIZE, "max_lr": 0.1, "expansion": 2.0}
CONTEXT = {"type": "memory_as_context", "d_model": WIDTH, "num_heads": 2, "num_persistent": PERSISTENT}
WINDOW = {"type": "sliding_window", "num_heads": 2, "window_size": 4, "num_sinks": PERSISTENT}


def build(config: dict) -> TokenMixer:
    torch.manual_seed(0)
    return scatter_parameters(build_mixer(config), 0).double()


def tokens(num_tokens: int = 11, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, num_tokens, WIDTH, generator=generator, dtype=torch.float64)


def by_definition(mixer: TokenMixer, x: Tensor) -> Tensor:
    """One sequence (1, T, M), token by token, with one softmax over [p | h | x]."""
    heads, width = mixer.num_heads, mixer.head_dim
    memory, count = mixer.memory, mixer.config.num_persistent
    state = memory.init_state(1, dtype=x.dtype)
    rotary, outputs = Rotary(width), []

    def turned(heads_of: Tensor, position: int) -> Tensor:
        cos, sin = rotary.tables(torch.tensor(position), torch.float64)
        first, second = heads_of.chunk(2, -1)
        return heads_of * cos + torch.cat([-second, first], -1) * sin

    def project(linear: torch.nn.Linear, token: Tensor) -> Tensor:
        return linear(token).view(heads, width)

    learned = [] if mixer.persistent is None else list(mixer.persistent)
    for t in range(x.shape[1]):
        place = t % SIZE
        if place == 0:
            start = state
            keys = [turned(project(mixer.k_proj, p), i) for i, p in enumerate(learned)]
            values = [project(mixer.v_proj, p) for p in learned]
        # the net as it was when the segment began
        empty = memory.init_state(1, dtype=x.dtype)
        empty.weights, empty.base = (start.weights, start.weights)
        recalled = answer(memory, empty, x[0, t])
        keys.append(turned(project(mixer.k_proj, recalled), count + place))
        keys.append(turned(project(mixer.k_proj, x[0, t]), count + SIZE + place))
        values += [project(mixer.v_proj, recalled), project(mixer.v_proj, x[0, t])]
        q = turned(project(mixer.q_proj, x[0, t]), count + SIZE + place)
        scores = torch.einsum("hd,nhd->hn", q, torch.stack(keys)) / width**0.5
        y = mixer.o_proj(torch.einsum("hn,nhd->hd", scores.softmax(-1), torch.stack(values)).flatten())
        out = memory.step(y[None], state)
        state = out.state
        outputs.append(mixer.context_norm(y) * mixer.memory_norm(out.hidden[0]).sigmoid())
    return torch.stack(outputs)[None]


def answer(memory: TokenMixer, state: object, token: Tensor) -> Tensor:
    """What a net at the start of a chunk answers to one token: a step that is thrown away."""
    state.num_tokens = torch.tensor([0])
    return memory.step(token[None], state).hidden[0]


@pytest.mark.parametrize("num_persistent", [0, PERSISTENT])
def test_memory_as_context_equals_its_definition(num_persistent: int) -> None:
    mixer = build({**CONTEXT, "num_persistent": num_persistent, "mixers": [MEMORY]})
    x = tokens()
    with torch.no_grad():
        assert_close("output", mixer(x).hidden, by_definition(mixer, x), 1e-10)


def test_memory_as_context_shows_what_it_recalls() -> None:
    mixer, x = build({**CONTEXT, "mixers": [MEMORY]}), tokens(3)
    with torch.no_grad(), probe() as seen:
        mixer(x)
    (share,) = seen["recall_share"]
    assert share.shape == (1, 3, 2)
    assert bool(((share > 0) & (share < 1)).all())


def test_recalled_tokens_carry_the_past_into_later_segments() -> None:
    """Nothing but the memory leads from one segment to the next."""
    mixer, x = build({**CONTEXT, "mixers": [MEMORY]}), tokens().requires_grad_()
    grad = torch.autograd.grad(mixer(x).hidden[:, 2 * SIZE :].sum(), x)[0]
    assert grad[:, :SIZE].abs().min() > 0


def test_product_is_a_window_gated_by_a_memory() -> None:
    config = {"type": "parallel", "d_model": WIDTH, "combine": "product", "mixers": [WINDOW, MEMORY]}
    mixer, x = build(config), tokens()
    window, memory = (inner(x).hidden for inner in mixer.mixers)
    expected = mixer.norms[0](window) * mixer.norms[1](memory).sigmoid()
    assert_close("output", mixer(x).hidden, expected, 1e-14)


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_persistent_tokens_are_read_first(combine: str) -> None:
    inner = {"type": "parallel", "combine": combine, "mixers": [WINDOW, MEMORY]}
    mixer = build(
        {
            "type": "persistent_tokens",
            "d_model": WIDTH,
            "num_persistent": PERSISTENT,
            "mixers": [inner],
        }
    )
    x = tokens(11, rows=2)
    joined = torch.cat([mixer.tokens.expand(2, -1, -1), x], dim=1)
    expected = mixer.mixers[0](joined).hidden[:, PERSISTENT:]
    assert_close("dense", mixer(x).hidden, expected, 1e-12)
    packed = mixer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 11, 22])).hidden
    assert_close("packed", packed.view_as(expected), expected, 1e-12)
    grad = torch.autograd.grad(mixer(x).hidden[:, -1].sum(), mixer.tokens)[0]
    assert grad.abs().min() > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONTEXT, "mixers": [WINDOW]}, "one titans mixer"),
        ({**CONTEXT, "mixers": [{**MEMORY, "conv_size": 3}]}, "cannot convolve"),
        ({**CONTEXT, "mixers": [{**MEMORY, "d_model": 4}]}, "d_model=4, the mixer around it 8"),
        ({**CONTEXT, "num_persistent": -1, "mixers": [MEMORY]}, "num_persistent must be"),
        ({"type": "persistent_tokens", "d_model": 8, "mixers": [WINDOW, MEMORY]}, "one inner mixer, got 2"),
        (
            {"type": "persistent_tokens", "d_model": 8, "num_persistent": 0, "mixers": [MEMORY]},
            "num_persistent must be",
        ),
    ],
)
def test_what_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer(config)


def test_a_convolving_memory_answers_no_single_tokens() -> None:
    memory = build({**MEMORY, "d_model": WIDTH, "conv_size": 2})
    with pytest.raises(ValueError, match="got conv_size 2"):
        memory.answer(tokens(), None, memory.init_state(1, dtype=torch.float64))
