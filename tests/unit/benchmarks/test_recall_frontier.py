"""The benchmark of recall against the size of the state."""

from __future__ import annotations

from pathlib import Path

import pytest

from memzoo.records import read_record


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_points_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recall_frontier

    arguments = ["--quick", "--records", str(tmp_path), "--work", str(tmp_path / "work"), "--rates", "0.01"]
    assert recall_frontier.main([*arguments, "--only", "based"]) == 0
    first = read_record(tmp_path / "recall_frontier.json")["results"]["points"]
    assert [found["mixer"] for found in first] == ["attention", "based"]
    assert first[0]["state_bytes"] > 0
    assert all(0 <= found["accuracy"] <= 1 for found in first)

    trained = []
    train_once = recall_frontier.train_once

    def counted(config, *others):  # type: ignore[no-untyped-def]
        trained.append(config.layers[1]["type"])
        return train_once(config, *others)

    monkeypatch.setattr(recall_frontier, "train_once", counted)
    assert recall_frontier.main([*arguments, "--only", "based", "--only", "sliding_window"]) == 0
    second = read_record(tmp_path / "recall_frontier.json")["results"]["points"]
    assert trained == ["sliding_window"]
    assert [found for found in second if found["mixer"] != "sliding_window"] == first


def test_other_settings_are_another_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    import recall_frontier

    monkeypatch.setattr(
        recall_frontier,
        "train_once",
        lambda config, rate, seed, sizes, device: {"seconds": 0.0, "validation": rate, "test": 0.1 * rate},
    )
    options = argparse.Namespace(work=tmp_path, rates=[1.0, 3.0, 2.0], device="cpu")
    found = recall_frontier.point(
        "based", {"num_heads": 1, "feature_dim": 4}, 0, recall_frontier.QUICK, options
    )
    assert found["accuracy"] == pytest.approx(0.3)  # of the rate that was best in validation
    assert found["state_bytes"] == 4 * 15 * (64 + 1) + 8  # and the number of tokens
    recall_frontier.point("based", {"num_heads": 1, "feature_dim": 4}, 1, recall_frontier.QUICK, options)
    recall_frontier.point("based", {"num_heads": 1, "feature_dim": 4}, 1, recall_frontier.QUICK, options)
    assert len(list(tmp_path.iterdir())) == 2
