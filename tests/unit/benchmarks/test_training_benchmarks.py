"""The quick forms of the benchmarks of training: they run, and their records say what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memzoo.records import read_record


def test_documents_ask_in_the_last_window_for_pairs_of_the_first() -> None:
    import stateful

    task = stateful.Task()
    windows = stateful.Documents(task, 0, 8, 8, whole=False)
    whole = stateful.Documents(task, 0, 8, 8, whole=True)
    assert whole.batch(0, 0).input_ids.shape == (2, 4 * task.window)
    # row 1 begins its second document in batch 3; its windows follow one another
    batches = [windows.batch(0, index) for index in range(3, 7)]
    assert [bool(batch.resets[1]) for batch in batches] == [True, False, False, False]
    ids, labels = (torch.stack([getattr(b, name)[1] for b in batches]) for name in ("input_ids", "labels"))
    pairs = dict(ids[0, : 2 * task.num_pairs].view(-1, 2).tolist())
    assert len(pairs) == task.num_pairs
    for window, asked in ((0, task.num_pairs), (1, 0), (2, 0), (3, task.num_pairs)):
        where = labels[window] != -100
        assert int(where.sum()) == asked
        assert all(
            pairs[key] == value
            for key, value in zip(ids[window][where].tolist(), labels[window][where].tolist(), strict=True)
        )
    far = stateful.Documents(task, 0, 8, 8, whole=False, only=3).batch(0, 3)
    assert torch.equal(far.input_ids, batches[0].input_ids)
    assert (far.labels != -100).any(1).tolist() == [row % 4 == 0 for row in range(8)]
    # row 1 reads the end of a document in batch 2 whose pairs nobody has seen
    assert not (windows.batch(0, 2).labels[1] != -100).any()


def test_stateful_in_its_quick_form(tmp_path: Path) -> None:
    import stateful

    assert stateful.main(["--quick", "--records", str(tmp_path)]) == 0
    record = read_record(tmp_path / "stateful.json")
    assert [run["arm"] for run in record["results"]["runs"]] == list(stateful.ARMS)
    assert record["results"]["chance"] == 1 / 16


def test_training_memory_in_its_quick_form(tmp_path: Path) -> None:
    import training_memory

    arguments = ["--quick", "--only", "full", "--tokens", "1024", "--records", str(tmp_path)]
    assert training_memory.main(arguments) == 0
    plain, chunked = read_record(tmp_path / "training_memory.json")["results"]["cases"]
    assert (plain["chunked"], chunked["chunked"]) == (False, True)
    assert plain["loss"] == pytest.approx(chunked["loss"], abs=1e-4)
    assert plain["peak_bytes"] > plain["before_bytes"] > 0


@pytest.mark.parametrize("model", ["full attention", "window of 512", "transformers Llama"])
def test_the_loss_is_one_loss_and_all_logits_cost_more(model: str) -> None:
    import training_memory

    ids = torch.randint(49_152, (1, 513), generator=torch.Generator().manual_seed(0))
    losses, peaks = [], []
    for chunked in (False, True):
        case = training_memory.Case(
            model=model, tokens=512, chunked=chunked, recompute=True, layers=1, d_model=192
        )
        torch.manual_seed(0)
        with training_memory.LiveBytes() as counter:
            _, loss = training_memory.build(case)
            losses.append(loss(ids[:, :-1], ids[:, 1:]))
            losses[-1].backward()
        peaks.append(counter.peak)
    assert torch.allclose(*losses, atol=1e-5)
    assert peaks[0] > peaks[1]


def test_a_case_over_the_limit_is_said_to_be(tmp_path: Path) -> None:
    import training_memory

    case = training_memory.Case(model="full attention", tokens=64, chunked=True, recompute=False, layers=1)
    row = training_memory.measure(case, 0.7, 1, count=False)
    assert row["fits"] is False
    assert "peak_bytes" not in row


def test_live_bytes_rise_and_fall() -> None:
    import training_memory

    with training_memory.LiveBytes() as counter:
        first = torch.ones(1000)
        view = first[:10]
        second = torch.ones(500)
        del second, first
        assert counter.live == 4000, "a view keeps its storage"
        del view
        assert counter.live == 0
    assert counter.peak == 6000
