"""The quick form of the benchmark of memories that learn while they read."""

from __future__ import annotations

from pathlib import Path

from memzoo.records import read_record


def test_quick_form(tmp_path: Path) -> None:
    import fast_weights

    assert fast_weights.main(["--quick", "--records", str(tmp_path)]) == 0
    results = read_record(tmp_path / "fast_weights.json")["results"]
    names = set(fast_weights.memories(fast_weights.QUICK, 8))
    assert {row["memory"] for row in results["speed"]} - {fast_weights.PEER} == names
    assert {row["chunk"] for row in results["speed"]} == {8, 32}
    assert {(row["memory"], row["past"]) for row in results["decode"]} == {
        (n, p) for n in names for p in (8, 40)
    }
    kept, again = (
        {row["chunks"]: row["tensor_bytes"] for row in results["memory"] if row["recompute"] is flag}
        for flag in (False, True)
    )
    assert again[8] < kept[8]
