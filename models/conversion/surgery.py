"""Surgery: a model whose attention is replaced by other mixers, everything else copied to the bit.

A parameter of the new mixer that has the name and shape of one in the old mixer takes its weights
(projections, biases, head norms); all others are new and keep their initialisation. What happened, and
whether the copy behaves, is in the report.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...layers.registry import mixer_entry
from ..config import ModelConfig
from ..decoder import MemoryLM


@dataclass(frozen=True)
class Check:
    """One parity check: a measured value and the bound it was held to."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound


@dataclass
class ParityReport:
    """What a conversion did.

    Attributes:
        layers: blocks whose mixer was replaced.
        num_copied: parameters (numbers) taken over from the source.
        new_parameters: name -> shape of every parameter that the source does not have.
        dropped: names of source parameters that the new mixers do not have.
        layer_errors: relative squared error of each replaced mixer's output, teacher-forced, before any
            training.
        checks: parity checks with their bounds.
    """

    layers: list[int]
    num_copied: int
    new_parameters: dict[str, tuple[int, ...]]
    dropped: list[str]
    layer_errors: dict[int, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        """Numbers in the new parameters."""
        return sum(int(torch.tensor(shape).prod()) for shape in self.new_parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON record."""
        plain = dataclasses.asdict(self)
        plain["num_new"] = self.num_new
        plain["new_parameters"] = {name: list(shape) for name, shape in self.new_parameters.items()}
        plain["checks"] = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return plain

    def raise_on_failure(self) -> None:
        """Raises ValueError naming the checks that failed."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            listed = "; ".join(f"{check.name}: {check.value:.3g} > {check.bound:.3g}" for check in failed)
            raise ValueError(f"the converted model does not agree with its source: {listed}.")


def converted_config(
    source: ModelConfig, target: Mapping[str, Any], layers: Sequence[int] | None = None
) -> ModelConfig:
    """The config of the model that `convert_mixers` makes of a model with the config `source`.

    Raises:
        ValueError: as `convert_mixers`.
    """
    chosen = list(range(source.depth))
    if layers is not None:
        valid = isinstance(layers, Sequence) and all(
            isinstance(index, int) and 0 <= index < source.depth for index in layers
        )
        if not valid or len(set(layers)) != len(layers):
            raise ValueError(
                f"layers to convert must be distinct numbers from 0 to {source.depth - 1}, got {layers!r}. "
                "Leave layers out to convert all."
            )
        chosen = list(layers)
    known = {item.name for item in dataclasses.fields(mixer_entry(str(target.get("type"))).config)}
    entries = {}
    for index in chosen:
        old = source.mixers[index].to_dict()
        inherited = {
            name: value for name, value in old.items() if name in known and name not in ("type", "d_model")
        }
        entries[index] = {**inherited, **copy.deepcopy(dict(target))}
    return source.replace_mixers(entries)


def convert_mixers(
    source: MemoryLM, target: Mapping[str, Any], layers: Sequence[int] | None = None
) -> tuple[MemoryLM, ParityReport]:
    """Replaces the mixers of some blocks and copies every weight that both models have.

    Args:
        source: the pretrained model; it is not changed.
        target: the new mixer, `{type: ..., ...}`; heads, rotary positions and biases are taken over from the
            mixer it replaces unless given.
        layers: blocks to convert (default: all). An empty list gives an equal model.

    Returns:
        the new model, same dtype and device as the source, and the report (without behavioural checks, see
        `check_parity`).

    Raises:
        ValueError: a block number outside the model or given twice, or an entry that is no valid mixer.
    """
    config = converted_config(source.config, target, layers)
    chosen = list(range(config.depth)) if layers is None else sorted(layers)
    device, dtype = source.embed_tokens.weight.device, source.embed_tokens.weight.dtype
    student = MemoryLM(config).to(device=device, dtype=dtype)
    report = _copy_weights(source, student, chosen)
    return student.train(source.training), report


def check_parity(source: MemoryLM, student: MemoryLM, report: ParityReport, tokens: Tensor) -> ParityReport:
    """Runs the behavioural checks and adds them to the report.

    Args:
        tokens: (B, T) ids, T beyond the windows of the new mixers.

    Checks: weights outside the replaced mixers are bit-identical; outputs are finite; on the first
    `window_size` tokens a windowed model equals its source (logits within 1e-4 in float32; a model in half
    precision is compared mixer by mixer, in float32 on the source's hidden states, within 1e-4 of the largest
    output, because its logits differ by rounding alone); with no layer converted all logits are equal.
    """
    replaced = tuple(f"layers.{index}.mixer." for index in report.layers)
    source_weights = source.state_dict()
    different = sum(
        not torch.equal(tensor, source_weights[name])
        for name, tensor in student.state_dict().items()
        if not name.startswith(replaced)
    )
    checks = [Check("weights outside the replaced mixers that differ", float(different), 0.0)]
    with torch.no_grad():
        expected, got = source(tokens).logits, student(tokens).logits
        checks.append(Check("logits that are not finite", float((~torch.isfinite(got)).sum()), 0.0))
        windows = [
            int(mixer.window_size)
            for mixer in (student.config.mixers[index] for index in report.layers)
            if hasattr(mixer, "window_size")
        ]
        if not report.layers:
            checks.append(
                Check(
                    "largest difference of the logits, no layer converted",
                    float((got - expected).abs().max()),
                    0.0,
                )
            )
        elif len(windows) == len(report.layers):
            reach = min(min(windows), tokens.shape[1])
            first = tokens[:, :reach]
            if got.dtype in (torch.float32, torch.float64):
                what = "largest difference of the logits"
                difference = float((student(first).logits - source(first).logits).abs().max())
            else:
                what = "largest relative difference of a mixer's output, in float32,"
                difference = _mixer_difference(source, student, report.layers, first)
            checks.append(Check(f"{what} on the first {reach} tokens (the window)", difference, 1e-4))
        report.layer_errors = layer_errors(source, student, report.layers, tokens)
    report.checks = checks
    return report


def layer_errors(
    source: MemoryLM, student: MemoryLM, layers: Sequence[int], tokens: Tensor
) -> dict[int, float]:
    """Relative squared error of each replaced mixer's output when it is given the source's hidden states."""
    errors = {}
    hidden = source.embed_tokens(tokens)
    for index, (old, new) in enumerate(zip(source.blocks, student.blocks, strict=True)):
        normed = old.mixer_input(hidden)
        target = old.mixer(normed).hidden
        if index in layers:
            errors[index] = relative_error(new.mixer(normed).hidden, target).item()
        hidden = old.after_mixer(hidden, target)
    return errors


def _mixer_difference(source: MemoryLM, student: MemoryLM, layers: Sequence[int], tokens: Tensor) -> float:
    """Largest difference between old and new mixers over the largest output of the old one, in float32."""
    largest = 0.0
    hidden = source.embed_tokens(tokens)
    for index, (old, new) in enumerate(zip(source.blocks, student.blocks, strict=True)):
        normed = old.mixer_input(hidden)
        if index in layers:
            expected, got = (
                copy.deepcopy(mixer).float()(normed.float()).hidden for mixer in (old.mixer, new.mixer)
            )
            largest = max(largest, float((got - expected).abs().max() / expected.abs().max()))
        hidden = old.after_mixer(hidden, old.mixer(normed).hidden)
    return largest


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Mean squared error over the mean square of the expected values, in float32: equal weight for loud and
    quiet layers.
    """
    expected = expected.float()
    return (actual.float() - expected).square().mean() / expected.square().mean().clamp(min=1e-12)


def _copy_weights(source: MemoryLM, student: MemoryLM, layers: Sequence[int]) -> ParityReport:
    old, new = source.state_dict(), student.state_dict()
    replaced = tuple(f"layers.{index}.mixer." for index in layers)
    taken = {
        name: old[name] for name, tensor in new.items() if name in old and old[name].shape == tensor.shape
    }
    fresh = {name: tuple(tensor.shape) for name, tensor in new.items() if name not in taken}
    outside = [name for name in fresh if not name.startswith(replaced)]
    assert not outside, f"parameters outside the replaced mixers are not in the source: {outside}"
    student.load_state_dict({**new, **taken})
    return ParityReport(
        layers=list(layers),
        num_copied=sum(tensor.numel() for tensor in taken.values()),
        new_parameters=fresh,
        dropped=sorted(set(old) - set(taken)),
    )


@contextmanager
def memory_off(model: MemoryLM) -> Iterator[None]:
    """Leaves the memory branch out of every mixer that has one; windows and sinks go on.

    Raises:
        ValueError: no mixer of the model has a memory that can be switched off.
    """
    switched = [block.mixer for block in model.blocks if getattr(block.mixer, "memory_enabled", False)]
    if not switched:
        raise ValueError(
            "no mixer of this model has a memory branch that can be switched off. "
            "Use mixers that have one, such as lolcats."
        )
    for mixer in switched:
        mixer.memory_enabled = False  # type: ignore[assignment]  # a switch of the mixers that have it
    try:
        yield
    finally:
        for mixer in switched:
            mixer.memory_enabled = True  # type: ignore[assignment]
