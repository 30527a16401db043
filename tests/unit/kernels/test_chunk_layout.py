"""Sequences of unequal length on a grid of chunks."""

import pytest
import torch

from memzoo.kernels import ChunkLayout

LENGTHS = [5, 0, 8, 1, 17]
PHASES = [3, 2, 0, 7, 5]


def test_aligned_input_is_a_view() -> None:
    layout = ChunkLayout.make([8, 8], 4)
    x = torch.arange(16.0)
    chunks = layout.to_chunks(x)
    assert chunks.shape == (4, 4)
    assert chunks.data_ptr() == x.data_ptr()
    assert layout.from_chunks(chunks).data_ptr() == x.data_ptr()
    assert layout.valid is None


@pytest.mark.parametrize("phases", [None, PHASES])
@pytest.mark.parametrize("chunk_size", [8, 9, 40])
def test_places_every_token_on_its_grid(phases: list[int] | None, chunk_size: int) -> None:
    layout = ChunkLayout.make(LENGTHS, chunk_size, phases)
    tokens = [(n, t) for n, length in enumerate(LENGTHS) for t in range(length)]
    chunks = layout.to_chunks(torch.tensor(tokens), fill=-1)
    assert chunks.shape == (layout.total_chunks, chunk_size, 2)
    starts = {n: list(layout.sequence_of_chunk).index(n) for n, length in enumerate(LENGTHS) if length}
    expected = torch.full_like(chunks, -1)
    for n, t in tokens:
        slot = t + (0 if phases is None else phases[n])
        expected[starts[n] + slot // chunk_size, slot % chunk_size] = torch.tensor([n, t])
    assert torch.equal(chunks, expected)
    assert torch.equal(layout.valid, expected[..., 0] >= 0)
    assert [i for i, first in enumerate(layout.first_chunk) if first] == sorted(starts.values())
    assert layout.num_chunks[1] == 0
    assert torch.equal(layout.from_chunks(chunks), torch.tensor(tokens))


@pytest.mark.parametrize("lengths", [[5, 0, 8], [6, 6], [0], [0, 0], []])
def test_round_trip_with_gradient(lengths: list[int]) -> None:
    layout = ChunkLayout.make(lengths, 4)
    x = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chunks = layout.to_chunks(x, fill=float("nan"))
    assert int(chunks.isnan().any(-1).sum()) == layout.total_chunks * 4 - sum(lengths)
    back = layout.from_chunks(chunks)
    assert torch.equal(back, x)
    back.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_one_long_sequence_costs_what_it_is_long() -> None:
    layout = ChunkLayout.make([1000, *[1] * 50], 16)
    assert layout.total_chunks == 63 + 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4], 0), "chunk_size must be at least 1, got 0"),
        (([4, -1], 4), "lengths must not be negative"),
        (([4], 4, [4]), "phases must hold 1 numbers from 0 to 3"),
        (([4, 4], 4, [0]), "phases must hold 2 numbers"),
    ],
)
def test_bad_layouts_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkLayout.make(*arguments)


def test_wrong_tensors_are_named() -> None:
    layout = ChunkLayout.make([4, 5], 4)
    with pytest.raises(ValueError, match="must hold 9 tokens"):
        layout.to_chunks(torch.zeros(8))
    with pytest.raises(ValueError, match=r"chunks must have shape \(3, 4\)"):
        layout.from_chunks(torch.zeros(3, 3))
