"""The decode benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from memzoo.models.decoder import MemoryLM
from memzoo.records import read_record


@pytest.mark.slow
def test_the_quick_form_measures_and_keeps_its_promises(tmp_path: Path) -> None:
    import decode

    assert decode.main(["--quick", "--records", str(tmp_path)]) == 0
    record = read_record(tmp_path / "decode.json")
    rows, generated = record["results"]["step"], record["results"]["generate"]
    assert {(r["model"], r["context"]) for r in rows} == {(r["model"], r["context"]) for r in generated}
    constant = {r["model"] for r in rows if r["is_constant"]}
    assert "small linear attention" in constant
    assert "small attention" not in constant
    assert all(r["ms_per_token"] > 0 for r in rows + generated)
    exact = [b for b in record["results"]["bounds"] if "ms per" not in b["bound"]]
    assert len(exact) >= len(constant) + 2
    assert all(b["passed"] for b in exact)


def test_broken_promises_are_named() -> None:
    import decode

    def row(context: int, ms: float, size: int, declared: int | None = None) -> dict[str, object]:
        return {
            "model": "m",
            "context": context,
            "is_constant": True,
            "ms_per_token": ms,
            "state_bytes": size,
            "declared_bytes": size if declared is None else declared,
        }

    good = [row(256, 1.0, 100), row(4096, 1.4, 100), row(65536, 9.0, 102)]
    assert all(b["passed"] for b in decode.bounds(good, good, (256, 4096), {"step": 0}))
    bad = [row(256, 1.0, 100), row(4096, 1.6, 103), row(65536, 1.0, 100, declared=96)]
    found = {
        b["bound"]: b["value"] for b in decode.bounds(bad, good, (256, 4096), {"step": 5}) if not b["passed"]
    }
    assert found == {
        "state bytes, largest / smallest context": 1.03,
        "ms per token of step, 4096 / 256": 1.6,
        "state bytes besides those declared, 65536": 4,
        "tokens read again by step": 5,
    }


def test_tokens_that_are_read_again_are_counted() -> None:
    import decode
    import torch

    model: MemoryLM = next(iter(decode.small_models(decode.QUICK, torch.device("cpu")).values()))
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with decode.counted_tokens(model) as count:
        state = model(ids, return_state=True).state
        model.step(ids[:, 0], state)
    assert count == [6]
    model(ids)
    assert count == [6], "nothing is counted outside"
