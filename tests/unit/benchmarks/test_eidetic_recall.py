"""The benchmark of recall by the size of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from memzoo.records import read_record


@pytest.mark.slow
def test_one_model_is_tested_with_several_sizes_and_lengths(tmp_path: Path) -> None:
    import eidetic_recall

    arguments = ["--quick", "--records", str(tmp_path), "--work", str(tmp_path / "work")]
    assert eidetic_recall.main([*arguments, "--only", "bmojo"]) == 0
    attention, bmojo = read_record(tmp_path / "eidetic_recall.json")["results"]["runs"]
    assert "by_size" not in attention
    assert set(bmojo["by_size"]) == {"0", "4", "8", "16", "32"}
    assert set(bmojo["by_length"]) == set(bmojo["by_size"]["4"]) == {"32", "64"}
    assert bmojo["by_size"]["16"] == bmojo["by_length"]  # the size it was trained with
    assert 0 < bmojo["pairs_stored"] <= 1
    kept = sorted((tmp_path / "work").iterdir())
    assert eidetic_recall.main([*arguments, "--only", "bmojo"]) == 0
    assert sorted((tmp_path / "work").iterdir()) == kept
