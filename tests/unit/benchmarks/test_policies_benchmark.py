"""The benchmark of bounded caches: cases run, bytes are those declared, a second run takes what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.layers.policies import make_policy
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache
from memzoo.models.policy_gates import attach_gates
from memzoo.records import read_record

ONLY = ("tova", "windowkv", "mikv, 4 bits", "sentencekv", "retention, untrained", "tova, grid")


def test_cases_run_and_are_kept(tmp_path: Path) -> None:
    import policies

    work = tmp_path / "work" / "quick"
    options = ["--quick", "--records", str(tmp_path), "--work", str(tmp_path / "work")]
    options += [word for name in ONLY for word in ("--only", name)]
    assert policies.main(options) == 0
    results = read_record(tmp_path / "policies.json")["results"]
    rows = {(row["case"], row["share"]): row for row in results["quality"]}
    assert {name for name, _ in rows} == {"full", *ONLY}
    full = rows["full", 1.0]
    assert full["above_full"] == {"mean": 0.0, "standard_error": 0.0}
    for (name, _), row in rows.items():
        assert row["bytes"] == row["declared_bytes"] or name == "windowkv"
        assert (row["num_texts"], row["num_needles"]) == (4, 4)
    assert rows["tova", 0.12]["bytes"] < full["bytes"] / 6
    assert rows["tova", 0.12]["above_full"]["mean"] != 0
    for kind in policies.DECODED:
        first, second = (row["bytes"] for row in results["decoding"] if row["policy"] == kind)
        assert first == second
    before = sorted(work.rglob("*.json"))
    stamps = [path.stat().st_mtime_ns for path in work.glob("figures/*")]
    # kvpress is not here: figures of the full cache in its place
    peers = {"prompts": policies.prompts.digest(work / "prompts.json"), "parts": 2, "versions": {}}
    kept = [json.loads(path.read_text()) for path in sorted(work.glob("figures/quality_full*"))]
    of_full = policies.prompts.joined(kept)
    (tmp_path / "peers.json").write_text(
        json.dumps({**peers, "rows": [{"case": "full", "share": 1.0, **of_full}]}), encoding="utf-8"
    )
    given = ["--skip-decoding", "--peers", str(tmp_path / "peers.json")]
    assert policies.main([*options, *given]) == 0
    assert sorted(work.rglob("*.json")) == before
    assert [path.stat().st_mtime_ns for path in work.glob("figures/*")] == stamps
    (row,) = read_record(tmp_path / "policies.json")["results"]["kvpress"]
    assert row["kvpress"]["perplexity"] == pytest.approx(row["memzoo"]["perplexity"])
    of_full["text"] = [loss + 0.1 for loss in of_full["text"]]
    (tmp_path / "peers.json").write_text(
        json.dumps({**peers, "rows": [{"case": "full", "share": 1.0, **of_full}]}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="other weights"):
        policies.main([*options, *given])


def test_every_case_can_be_made() -> None:
    import policies

    for known in (policies.cases([[0]], [1], ["a", "b"]), policies.peer_cases()):
        for case in known.values():
            for share in policies.SHARES:
                made = policies.budgeted(case, share, 512)
                made.pop("gates", None)
                make_policy(made)


def toy(tmp_path: Path) -> tuple[Any, Any, Path]:
    """A model of random weights, a part of needles, and gates for it."""
    import policies

    model = policies.load_toy(tmp_path / "model")
    ids = torch.randint(3, 64, (3, 70), generator=torch.Generator().manual_seed(1))
    gates = policies.find_gates((), tmp_path, gate_width=8)[policies.UNTRAINED]
    return model, policies.Part(ids, 66, True), gates


@pytest.mark.parametrize(
    "case",
    ["retention, x", "retention, x, one budget", "h2o, CaM", "snapkv, AdaKV", "pyramidkv", "d2o"]
    + ["kvmerger", "elastic_cache", "compresskv", "windowkv", "sentencekv", "arkv", "think", "mikv, 2 bits"],
)
@torch.no_grad()
def test_a_prompt_handed_over_is_a_prompt_read(case: str, tmp_path: Path) -> None:
    import policies
    import replay

    model, part, gates = toy(tmp_path)
    values = policies.budgeted(policies.cases([[0, 1]] * 4, [3], ["x"], 8)[case], 0.25, 96)
    if values.pop("gates", None):
        attach_gates(model, gates)
    policy = make_policy(values)
    for cut in part.cuts.values():
        with attach_policy(model, policy):
            mine = replay.policy_cache(model, policy, replay.read(model, part.ids[:, :66]), cut)
            theirs = PolicyCache(model.config, policy)
            model(part.ids[:, :cut], past_key_values=theirs)
            for position in range(cut, 68):
                step = part.ids[:, position : position + 1]
                found, expected = (model(step, past_key_values=x).logits for x in (mine, theirs))
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert mine.memory_bytes() == theirs.memory_bytes()


class HalfPress:
    """A press as those of kvpress act: of a prompt the later half stays."""

    def forward_hook(self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> Any:
        if keywords["cache_position"][-1] + 1 == keywords["hidden_states"].shape[1]:
            layer = keywords["past_key_values"].layers[module.layer_idx]
            half = layer.keys.shape[2] // 2
            layer.keys, layer.values = layer.keys[:, :, half:], layer.values[:, :, half:]
        return output

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def hook(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
            places = torch.arange(keywords["hidden_states"].shape[1])  # newer transformers hand none down
            return self.forward_hook(module, arguments, {"cache_position": places, **keywords}, output)

        hooks = [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers
        ]
        yield
        for hook_of in hooks:
            hook_of.remove()


def test_the_peer_measures_what_the_benchmark_does(tmp_path: Path) -> None:
    import kvpress_peer
    import policies

    model, part, _ = toy(tmp_path)
    text = policies.Part(part.ids, 60, False)
    for rows in (part, text):
        reading = kvpress_peer.read(model, rows.ids[:, : rows.first], "sdpa")
        ours = policies.measured(model, None, rows, {}, policies.Reader(model))
        theirs = kvpress_peer.measured(model, None, 100, rows, reading)
        for name in rows.cuts:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-5)
        assert theirs["bytes"] == ours["bytes"]
    kvpress_peer.check(model, HalfPress(), part, 66, "sdpa")
    half = kvpress_peer.measured(model, lambda ratio: HalfPress(), 33, text, reading)
    assert half["bytes"] == ours["bytes"] // 2
    assert half["text"] != pytest.approx(ours["text"], abs=1e-5)
    for budget in (8, 61, 128):
        assert int(500 * (1 - kvpress_peer.share_dropped(budget, 500))) == budget
