"""`memzoo.testing` on a mixer that nobody registered, and the example of docs/contract.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memzoo.layers import list_mixers
from memzoo.testing import ContractError, check_mixer

from .probes.segment_mean import SegmentMean, SegmentMeanConfig

ROOT = Path(__file__).parents[2]


def test_an_unregistered_mixer_is_checked_and_left_alone():
    mixer = SegmentMean(SegmentMeanConfig(d_model=6, segment_size=3))
    assert mixer.config.type not in list_mixers()
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    report = check_mixer(mixer, splits=4, compile=False)
    assert {"streaming-float64", "padding-float32", "gradients", "value"} <= set(report.errors)
    assert max(report.errors["streaming-float64"], report.errors["padding-float64"]) <= 1e-10
    assert all(torch.equal(before[name], value) for name, value in mixer.state_dict().items())


def test_a_mixer_is_checked_from_its_config():
    report = check_mixer(
        {"type": "sliding_window", "d_model": 8, "num_heads": 2, "window_size": 3}, splits=2, compile=False
    )
    assert report.errors["streaming-float64"] <= 1e-10


def test_a_broken_promise_names_the_check_the_error_and_the_place():
    class Leaky(SegmentMean):
        def mix(self, x, ctx, state):
            out = super().mix(x, ctx, state)
            out.hidden = out.hidden + 0.01 * x.mean(1, keepdim=True)
            return out

    with pytest.raises(ContractError, match=r"^streaming: outputs .*error .* at \(\d+, \d+, \d+\), allowed"):
        check_mixer(Leaky(SegmentMeanConfig(d_model=6, segment_size=3)), splits=4)


def test_the_example_of_the_documentation_keeps_the_contract(tmp_path):
    text = (ROOT / "docs" / "contract.md").read_text()
    (example,) = re.findall(r"```python\n(\"\"\"Decayed.*?)```", text, flags=re.S)
    script = tmp_path / "decay_memory.py"
    script.write_text(example)
    source = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=source, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "streaming-float64" in run.stdout
