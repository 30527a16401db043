"""The benchmark of the soft cache size: both forms give the same sums, and what does not fit is said to."""

from __future__ import annotations

from pathlib import Path

import pytest

from memzoo.records import read_record


def test_both_forms_agree_and_a_limit_holds(tmp_path: Path) -> None:
    import soft_cache_size

    assert soft_cache_size.main(["--quick", "--repeats", "1", "--records", str(tmp_path)]) == 0
    ours, plain = read_record(tmp_path / "soft_cache_size.json")["results"]["cases"]
    assert ours["form"] == "soft_cache_size"
    for name in ("sum", "gradient_sum"):
        assert ours[name] == pytest.approx(plain[name], rel=1e-4)
    given = {"form": "dense matrix", "tokens": 16_384, "heads": 1, "repeats": 1, "limit_gib": 1.0}
    assert soft_cache_size.measure(given) == {
        "form": "dense matrix",
        "tokens": 16_384,
        "heads": 1,
        "fits": False,
    }
