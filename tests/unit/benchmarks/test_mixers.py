"""The benchmark of whole layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memzoo.records import read_record


@pytest.mark.slow
def test_the_quick_form_times_layers_beside_attention(tmp_path: Path) -> None:
    import mixers

    peer = "transformers Gated DeltaNet"
    arguments = ["--quick", "--only", "linear_attention", "--only", peer, "--dtype", "float32"]
    assert mixers.main([*arguments, "--records", str(tmp_path)]) == 0
    results = read_record(tmp_path / "mixers.json")["results"]
    timed = {(row["mixer"], row["mode"], row["tokens"]) for row in results["rows"]}
    parallel = {(row[0], row[1]) for row in timed if row[1] != "decode"}
    assert parallel == {
        (name, mode) for name in ("attention", "linear_attention", peer) for mode in mixers.MODES
    }
    assert {row[0] for row in timed if row[1] == "decode"} == {"attention", "linear_attention"}
    assert all(row["median_ms"] > 0 for row in results["rows"])
    assert not results["skipped"]


def test_recurrences_are_timed_beside_the_functions_of_others() -> None:
    import argparse

    import mixer_operations
    import mixers

    options = argparse.Namespace(budget=0.0)
    rows = list(mixer_operations.timed("float32", 128, torch.device("cpu"), options, scale=8))
    timed = {(row["recurrence"], row["by"]): row["speed_of_ours"] for row in rows if "skipped" not in row}
    assert timed["Mamba-2", "memzoo"] == timed["Gated DeltaNet", "memzoo"] == 1.0
    assert min(timed["Mamba-2", "transformers"], timed["Gated DeltaNet", "transformers"]) > 0
    rows = [{**row, "tokens": 2048, "speed_of_ours": 2.5} for row in rows]
    assert [check["reached"] for check in mixers._checked_operations(rows)] == [False, False]


@pytest.mark.parametrize("recurrence", ["Mamba-2", "Gated DeltaNet"])
def test_what_is_timed_in_turns_computes_the_same(recurrence: str) -> None:
    import mixer_operations

    shapes, functions = mixer_operations.recurrences(scale=8)[recurrence]
    made = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, 128, *shape, generator=made) for name, shape in shapes.items()}
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    expected = functions["memzoo"](**inputs)
    torch.testing.assert_close(
        functions["transformers"](**inputs).view_as(expected), expected, rtol=1e-4, atol=1e-4
    )


def test_figures_are_held_against_what_is_wanted() -> None:
    import mixers

    def row(
        mixer: str, tokens: int, ms: float, mode: str = "forward+backward", **more: object
    ) -> dict[str, object]:
        return {"mixer": mixer, "dtype": "float32", "tokens": tokens, "mode": mode, "median_ms": ms, **more}

    rows = [
        row("attention", 8192, 100.0),
        row("mamba2", 8192, 50.0),
        row("mamba2", 32768, 250.0),
        row("mamba2", 1024, 1.0, "decode", is_constant=True),
        row("mamba2", 65536, 1.0, "decode", is_constant=True),
        row("mamba1", 2048, 1024.0),
    ]
    found = {check["what"]: (check["value"], check["reached"]) for check in mixers.checked(rows)}
    assert found == {
        "tokens/s of mamba1, float32, 2,048 tokens": (2000.0, False),
        "speed of mamba2 over attention, float32, 8,192 tokens": (2.0, True),
        "time of mamba2, float32, 32,768 over 8,192 tokens": (5.0, False),
        "time of a token of mamba2, float32, after 65,536 over 1,024": (1.0, True),
    }


def test_a_call_that_would_take_too_long_is_left_out_with_its_reason() -> None:
    import argparse

    import mixers

    options = argparse.Namespace(max_seconds=10.0, max_gib=1.0)
    before = [
        {"mixer": "attention", "tokens": 1024, "median_ms": 1e3, "peak_mib": 100.0},
        {"mixer": "mamba2", "tokens": 1024, "median_ms": 1e3, "peak_mib": 512.0},
    ]

    def reason(name: str, length: int) -> str | None:
        shorter = next((row for row in before if row["mixer"] == name), None)
        return mixers._too_much(name, "forward", length, shorter, before, options)

    assert reason("attention", 4096) == "about 16 s expected, limit 10"
    assert reason("mamba2", 4096) == "about 2 GiB expected, limit 1"
    assert reason("mamba2", 2048) is None
    assert reason("based", 2048) == "left out at 1024 tokens"


def test_what_is_timed_is_kept_for_the_same_sources(tmp_path: Path) -> None:
    import argparse

    import mixers

    options = argparse.Namespace(
        quick=False, runs=tmp_path, max_seconds=1.0, max_gib=1.0, budget=1.0, max_length=8, commit="a"
    )
    made: list[str] = []

    def make(commit: str, dtype: str = "float32") -> list[dict[str, object]]:
        options.commit = commit
        keep = mixers._keeper({}, dtype, torch.device("cpu"), options)
        return keep("512", lambda: made.append(commit) or iter([{"by": commit}]))

    assert make("a") == make("a") == [{"by": "a"}]
    assert make("b") == [{"by": "b"}]
    assert make("a", "bfloat16") == [{"by": "a"}]
    assert made == ["a", "b", "a"]


def test_every_mixer_but_sums_and_chains_is_timed() -> None:
    import mixers

    from memzoo.layers import list_mixers

    made = mixers.subjects(512, 64, None)
    assert set(list_mixers()) - set(made) == {"parallel", "persistent_tokens", "sequential"}
    with torch.device("meta"):
        for name in set(made) - set(mixers.PEERS):
            made[name]()


def test_projections_alone_are_the_large_matrices_of_a_layer() -> None:
    import mixers

    for name in mixers.COMPARED:
        layer, alone = mixers._ours(name, 128, 32), mixers._projections(name, 128, 32)
        sizes = [sum(weight.numel() for weight in module.parameters()) for module in (alone, layer)]
        assert 0.97 * sizes[1] < sizes[0] <= sizes[1]
        assert alone(torch.randn(1, 3, 128)).shape == (1, 3, 128)


def test_an_unknown_name_is_an_error() -> None:
    import mixers

    with pytest.raises(SystemExit, match="no mixer or peer 'mamba9'"):
        mixers.main(["--only", "mamba9"])
