"""What gates keep of a text: the map of evictions, its figures, and the page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.report_page import render_page
from memzoo.train.retention_map import (
    RetentionFacts,
    eviction_map,
    punctuation_lift,
    retention_facts,
    retention_sections,
)


def gated(layers: int = 3) -> MemoryLM:
    torch.manual_seed(0)
    entry = {"type": "gated_attention", "num_heads": 4, "num_kv_heads": 2, "gate_width": 8, "gate_bias": 1.0}
    return MemoryLM(ModelConfig(vocab_size=40, d_model=16, layers=entry, num_layers=layers)).eval()


@pytest.mark.parametrize("buffer", [1, 5])
def test_a_map_never_takes_back_and_keeps_to_the_budget(buffer: int) -> None:
    g = -torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    kept = eviction_map(g, 7, buffer=buffer)
    assert kept.shape == (40, 6, 40)
    assert (
        not (kept[1:, :, :] & ~kept[:-1]).any(2).logical_and((kept[1:] & ~kept[:-1]).sum(2) != 1).any()
    )  # the only new token of a step is the one just read
    for t in range(40):
        assert not kept[t, :, t + 1 :].any()
        held = kept[t].sum(1)
        grid = (t + 1) // buffer * buffer
        assert (held == min(7, grid) + t + 1 - grid).all()
    last = kept[39, 0].nonzero().squeeze(1) if buffer == 1 else None
    if last is not None:
        # by the definition, one token after another
        held = []
        for t in range(40):
            held.append(t)
            if len(held) > 7:
                held.remove(min(held, key=lambda i: float(g[i, 0]) * (t - i)))
        assert last.tolist() == held


def test_extremes_of_a_map() -> None:
    forever = eviction_map(torch.zeros(9, 1), 4)
    assert forever[-1, 0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]  # of equal ones the earlier stays
    recent = eviction_map(torch.full((9, 1), -1.0), 4)
    assert recent[-1, 0].nonzero().squeeze(1).tolist() == [5, 6, 7, 8]
    protected = eviction_map(torch.zeros(9, 1), 4, window=2)
    assert protected[-1, 0].nonzero().squeeze(1).tolist() == [0, 1, 7, 8]
    for options in ({"budget": 0}, {"budget": 4, "buffer": 0}, {"budget": 4, "window": 5}):
        with pytest.raises(ValueError, match="must be at least 1"):
            eviction_map(torch.zeros(9, 1), **options)


def test_figures_of_a_text() -> None:
    model = gated()
    tokens = torch.randint(40, (1, 30), generator=torch.Generator().manual_seed(1))
    facts = retention_facts(model, tokens, 8)
    assert facts.kept.shape == (30, 6, 30)
    assert facts.half_lives.shape == (30, 6)
    assert facts.layer_sizes.shape == (3,)
    assert facts.layers == (0, 1, 2)
    assert math.isclose(float(facts.held_share.sum()), 8.0, rel_tol=1e-5)
    assert (facts.window_scores >= 1 / 8).all()  # the newest token is there
    gate = model.blocks[0].mixer.retention_gate
    with torch.no_grad():
        gate.bias.fill_(1e4)
        gate.out_proj.weight.zero_()
    facts = retention_facts(model, tokens, 8)
    assert facts.sink_scores[:2].tolist() == [1.0, 1.0]
    assert float(facts.layer_sizes[0]) == pytest.approx(15.5 / 8)
    plain = MemoryLM(
        ModelConfig(vocab_size=40, d_model=16, layers={"type": "attention", "num_heads": 2}, num_layers=1)
    )
    with pytest.raises(ValueError, match="no retention gates"):
        retention_facts(plain, tokens, 8)


def test_punctuation() -> None:
    kept = torch.tensor([[[True, False, True, False]]]).expand(4, 1, 4)
    nothing = torch.zeros(0)
    facts = RetentionFacts(kept, nothing, nothing, nothing, nothing, (0,), 2)
    assert punctuation_lift(facts, [".", "a", " ,", "b"]) == 2.0
    assert punctuation_lift(facts, [".", " ?!", "a", "b"]) == 1.0
    assert math.isnan(punctuation_lift(facts, ["a", "b", "c", " "]))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_page_shows_the_text_and_the_maps(tmp_path: Path, layers: int) -> None:
    tokens = torch.randint(40, (1, 300), generator=torch.Generator().manual_seed(1))
    facts = retention_facts(gated(layers), tokens[:, : 300 if layers == 1 else 20], 8)
    pieces = [f" w{n}<" if n % 3 else "." for n in range(facts.kept.shape[0])]
    page = render_page("gates", retention_sections(facts, pieces))
    assert page.count('class="map"') == 2 * layers
    assert " w1&lt;</span>" in page
    assert "Half-life of tokens" in page


def test_the_command_draws_a_page(tmp_path: Path) -> None:
    import memzoo
    from memzoo.train.inspect_command import inspect

    torch.manual_seed(0)
    entry = {"type": "gated_attention", "num_heads": 2, "gate_width": 8, "gate_bias": 1.0}
    model = MemoryLM(ModelConfig(vocab_size=384, d_model=16, layers=entry, num_layers=2))
    memzoo.save(model, tmp_path / "model", tokenizer="bytes")
    page = tmp_path / "gates.html"
    said = inspect(str(tmp_path / "model"), num_tokens=40, retention=str(page), budget=8)
    assert "punctuation is held" in said
    assert "What is left of the text" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be an \.html file"):
        inspect(str(tmp_path / "model"), retention=str(tmp_path / "gates.png"))
