"""`memzoo.testing` on a mixer that nobody registered, and the example of docs/contract.md."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from memzoo.layers import LayerOutput, MixerConfig, State, TokenMixer, list_mixers
from memzoo.testing import ContractError, check_mixer, contract_checks

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


def bare_tensor(mixer, x, ctx, state):
    return x


def no_state(mixer, x, ctx, state):
    return LayerOutput(SegmentMean.mix(mixer, x, ctx, state).hidden)


def crash(mixer, x, ctx, state):
    raise IndexError("out of range")


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (bare_tensor, "mix of Faulty must return LayerOutput.*got Tensor"),
        (no_state, "must return the new state when ctx.return_state is set.*got NoneType"),
        (crash, "interface: the mixer stopped with IndexError: out of range"),
        (TokenMixer.mix, "Faulty does not implement mix"),
    ],
)
def test_a_mixer_that_cannot_run_breaks_the_contract(mix, message):
    faulty = type("Faulty", (SegmentMean,), {"mix": mix})
    with pytest.raises(ContractError, match=message):
        check_mixer(faulty(SegmentMeanConfig(d_model=6, segment_size=3)))


def test_what_is_no_mixer_breaks_the_contract():
    for given in (SegmentMean, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ContractError, match=r"a mixer is an instance of TokenMixer.*Give MyMixer\(config\)"
        ):
            check_mixer(given)


def test_a_sum_in_the_dtype_of_the_activations_breaks_the_contract():
    @dataclass(kw_only=True)
    class SumState(State):
        total: torch.Tensor  # (N, M)

    class Sum(TokenMixer):
        def __init__(self, config):
            super().__init__(config)
            self.proj = torch.nn.Linear(config.d_model, config.d_model)

        def init_weights(self):
            self.proj.reset_parameters()

        def init_state(self, batch_size, *, device=None, dtype=None):
            total = torch.zeros(batch_size, self.d_model, device=device, dtype=dtype or torch.float32)
            return SumState(num_tokens=torch.zeros(batch_size, dtype=torch.int64), total=total)

        def mix(self, x, ctx, state):
            state = state or self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
            sums = [state.total[row] + part.cumsum(0) for row, part in enumerate(ctx.split(self.proj(x)))]
            last = [part[-1] if len(part) else state.total[row] for row, part in enumerate(sums)]
            return LayerOutput(
                ctx.merge(sums), SumState(num_tokens=ctx.num_tokens_after, total=torch.stack(last))
            )

        def flops_per_token(self, num_tokens):
            return 2 * self.d_model**2

    with pytest.raises(ContractError, match=r"bfloat16: total keeps .* stored tokens lie along dimension 1"):
        contract_checks(Sum(MixerConfig(type="sum", d_model=4)))["bfloat16"]()


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
