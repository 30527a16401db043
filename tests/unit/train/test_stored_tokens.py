"""What `memzoo inspect` shows of stored tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from memzoo import cli
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.train.data.tokenizers import byte_tokenizer
from memzoo.train.stored_tokens import stored_tokens, strip_page

BMOJO = {
    "type": "bmojo",
    "num_heads": 2,
    "window_size": 4,
    "eidetic_size": 3,
    "mixers": [{"type": "base_conv"}],
}


def model(layer: dict[str, object] = BMOJO) -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(ModelConfig(vocab_size=257, d_model=8, layers=[{"type": "base_conv"}, layer])).eval()


def test_what_was_stored_and_when() -> None:
    network, tokens = model(), torch.randint(0, 257, (23,), generator=torch.Generator().manual_seed(0))
    (layer,) = stored_tokens(network, tokens)
    assert layer.layer == 1
    assert layer.chunk_size == 4
    state = network(tokens[None], return_state=True).state
    positions = next(t for name, t in state.named_tensors() if name.endswith("store.order"))[0] - 1
    assert layer.kept == positions.tolist()
    for place, (entered, left) in enumerate(zip(layer.entered, layer.left, strict=True)):
        assert (entered is None) or entered * 4 >= place + 4  # behind every window of its chunk
        assert left is None or (entered is not None and left > entered)
    weakest = min(layer.innovation[place] for place in layer.kept)
    never = [place for place in range(17) if layer.entered[place] is None]
    assert all(layer.innovation[place] <= weakest for place in never)


def test_the_page_marks_them() -> None:
    words = [chr(97 + n % 26) for n in range(22)] + ["<b>"]
    layers = stored_tokens(model(), torch.arange(23))
    page = strip_page("a & b", words, layers)
    assert "a &amp; b" in page
    assert "<b>" not in page
    assert len(re.findall("<span class=kept ", page)) == len(layers[0].kept) == 3


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model(), tmp_path / "model", byte_tokenizer())
    arguments = ["inspect", "--model", str(tmp_path / "model"), "--num_tokens", "43"]
    assert cli.main([*arguments, "--stored", str(tmp_path / "page.html")]) == 0
    assert "3 stored" in capsys.readouterr().out
    assert "layer 1: 3 of 43 tokens stored" in Path(tmp_path, "page.html").read_text(encoding="utf-8")


def test_a_model_without_a_store_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of this model stores tokens"):
        stored_tokens(model({**BMOJO, "eidetic_size": 0}), torch.arange(5))
    with pytest.raises(ValueError, match="has no tokens"):
        stored_tokens(model(), torch.arange(0))
