"""The benchmark of bounded caches: cases run, bytes are those declared, a second run takes what is kept."""

from __future__ import annotations

from pathlib import Path

from memzoo.layers.policies import make_policy
from memzoo.records import read_record

ONLY = ("tova", "windowkv", "mikv, 4 bits")


def test_cases_run_and_are_kept(tmp_path: Path) -> None:
    import policies

    options = ["--quick", "--records", str(tmp_path), "--work", str(tmp_path / "work")]
    options += [word for name in ONLY for word in ("--only", name)]
    assert policies.main(options) == 0
    results = read_record(tmp_path / "policies.json")["results"]
    rows = {(row["case"], row["share"]): row for row in results["quality"]}
    assert {name for name, _ in rows} == {"full", *ONLY}
    full = rows["full", 1.0]["bytes"]
    for (name, _), row in rows.items():
        assert row["bytes"] == row["declared_bytes"] or name == "windowkv"
    assert rows["tova", 0.12]["bytes"] < full / 6
    for kind in policies.DECODED:
        first, second = (row["bytes"] for row in results["decoding"] if row["policy"] == kind)
        assert first == second
    before = sorted((tmp_path / "work" / "quick").iterdir())
    assert policies.main([*options, "--skip-decoding"]) == 0
    assert sorted((tmp_path / "work" / "quick").iterdir()) == before


def test_every_case_can_be_made() -> None:
    import policies

    for case in policies.cases([[0]]).values():
        for share in policies.SHARES:
            make_policy(policies.budgeted(case, share, 512))
