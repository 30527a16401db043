"""Surgery: a model whose attention is replaced by other mixers, everything else copied to the bit.

What a new mixer takes from the old one is in `weight_maps`; all else in it is new and keeps its
initialisation. What happened, and whether the copy behaves, is in the report.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.parts.short_conv import ShortConv
from ..decoder import MemoryLM
from .finite import find_not_finite
from .plan import ConversionPlan, converted_config, exact_reach, softmax_reach
from .switches import memory_off
from .weight_maps import weight_map

_REPLACED = re.compile(r"layers\.(?P<layer>\d+)\.mixer\..*")


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
        new_parameters: name -> shape of every parameter that the source does not have; of one that is taken
            over in part, the rows that are not.
        dropped: names of source parameters that the new mixers do not have.
        expanded: names of parameters whose key/value heads were repeated (grouped queries).
        output_scales: block -> factor on the output projection of its new mixer, where that began louder than
            the old one.
        layer_errors: relative squared error of each replaced mixer's output, teacher-forced, before any
            training.
        checks: parity checks with their bounds.
    """

    layers: list[int]
    num_copied: int
    new_parameters: dict[str, tuple[int, ...]]
    dropped: list[str]
    expanded: list[str] = field(default_factory=list)
    output_scales: dict[int, float] = field(default_factory=dict)
    layer_errors: dict[int, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        """Numbers in the new parameters."""
        return sum(math.prod(shape) for shape in self.new_parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON record."""
        plain = dataclasses.asdict(self)
        plain["num_new"] = self.num_new
        plain["new_parameters"] = {name: list(shape) for name, shape in self.new_parameters.items()}
        plain["checks"] = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return plain

    def summary(self) -> str:
        """The report as a few lines of text."""
        errors = ", ".join(f"{index}: {error:.3g}" for index, error in self.layer_errors.items())
        scales = ", ".join(f"{index}: {scale:.3g}" for index, scale in self.output_scales.items())
        lines = [
            f"converted blocks: {', '.join(map(str, self.layers)) or 'none'}",
            f"numbers taken over: {self.num_copied:,}",
            f"new numbers: {self.num_new:,}{_kinds(list(self.new_parameters))}",
            f"heads repeated: {len(self.expanded)} parameters{_kinds(self.expanded)}",
            f"without a place any more: {len(self.dropped)} parameters{_kinds(self.dropped)}",
            f"outputs made quieter, by block: {scales or 'none'}",
            f"relative squared error of each new mixer on the source's states: {errors or 'not measured'}",
        ]
        for check in self.checks:
            verdict = "passed" if check.passed else "FAILED"
            lines.append(f"{verdict}: {check.name}: {check.value:.3g} (at most {check.bound:.3g})")
        return "\n".join(lines)

    def raise_on_failure(self) -> None:
        """Raises ValueError naming the checks that failed."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            listed = "; ".join(f"{check.name}: {check.value:.3g} > {check.bound:.3g}" for check in failed)
            raise ValueError(f"the converted model does not agree with its source: {listed}.")


def _kinds(names: Sequence[str]) -> str:
    """The names without their blocks, each once, in brackets."""
    kinds = dict.fromkeys(name.partition(".mixer.")[2] or name for name in names)
    return f" ({', '.join(kinds)})" if kinds else ""


def convert_mixers(
    source: MemoryLM, plan: ConversionPlan, tokens: Tensor | None = None
) -> tuple[MemoryLM, ParityReport]:
    """Replaces the mixers of some blocks and copies every weight that both models have.

    Args:
        source: the pretrained model; it is not changed.
        plan: what to convert to. With no blocks to convert the new model equals the source.
        tokens: (B, T) ids. Given these, a new mixer that promises no equality with the old one and is louder
            on the source's hidden states than that is scaled down to it, by its output projection: mixers
            that normalise their output would drown the residual stream until training has made them quiet.

    Returns:
        the new model, same dtype and device as the source, and the report (without behavioural checks, see
        `check_parity`).

    Raises:
        ValueError: a block number outside the model or given twice, or a target that is no valid mixer.
    """
    config = converted_config(source.config, plan)
    device, dtype = source.embed_tokens.weight.device, source.embed_tokens.weight.dtype
    student = MemoryLM(config).to(device=device, dtype=dtype)
    layers = plan.converted_layers(config.depth)
    for index in layers:
        for module in student.blocks[index].mixer.modules():
            if isinstance(
                module, ShortConv
            ):  # a random one would scramble the projections that are taken over
                module.init_identity()
    report = _copy_weights(source, student, layers)
    if tokens is not None:
        report.output_scales = _scale_down(source, student, report.layers, tokens)
    return student.train(source.training), report


def check_parity(source: MemoryLM, student: MemoryLM, report: ParityReport, tokens: Tensor) -> ParityReport:
    """Runs the behavioural checks and adds them to the report.

    Args:
        tokens: (B, T) ids, T beyond the windows of the new mixers.

    Raises:
        ValueError: the source itself gives numbers that are not finite; the message says where.

    Checks: weights outside the replaced mixers are bit-identical; outputs are finite; on the first tokens, as
    far as the new mixers promise (`exact_reach`), the model equals its source (logits within 1e-4 in float32;
    a model in half precision is compared mixer by mixer, in float32 on the source's hidden states, within
    1e-4 of the largest output, because its logits differ by rounding alone); with no layer converted all
    logits are equal; with retention gates ignored the model equals its source.
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
        if not bool(torch.isfinite(expected).all()):
            raise ValueError(
                "the source gives numbers that are not finite. They begin in "
                f"{find_not_finite(source, tokens, whose='source') or 'its logits'}. Get its weights again."
            )
        checks.append(Check("logits that are not finite", float((~torch.isfinite(got)).sum()), 0.0))
        reaches = [
            reach
            for index in report.layers
            for reach in (
                exact_reach(student.config.mixers[index]),
                softmax_reach(source.config.mixers[index]),
            )
        ]
        reach = min([tokens.shape[1], *(size for size in reaches if size is not None)])
        if not report.layers:
            checks.append(
                Check(
                    "largest difference of the logits, no layer converted",
                    float((got - expected).abs().max()),
                    0.0,
                )
            )
        elif reach:
            first = tokens[:, :reach]
            if got.dtype in (torch.float32, torch.float64):
                what = "largest difference of the logits"
                difference = float((student(first).logits - source(first).logits).abs().max())
            else:
                what = "largest relative difference of a mixer's output, in float32,"
                difference = _mixer_difference(source, student, report.layers, first)
            checks.append(Check(f"{what} on the first {reach} tokens (the window)", difference, 1e-4))
        if report.layers and all(student.config.mixers[n].type == "gated_attention" for n in report.layers):
            with memory_off(student, report.layers):
                off = float((student(tokens).logits - expected).abs().max())
            checks.append(Check("largest difference of the logits with the gates ignored", off, 1e-4))
        report.layer_errors = layer_errors(source, student, report.layers, tokens)
    report.checks = checks
    return report


def layer_errors(
    source: MemoryLM, student: MemoryLM, layers: Sequence[int], tokens: Tensor
) -> dict[int, float]:
    """Relative squared error of each replaced mixer's output when it is given the source's hidden states."""
    return {
        index: relative_error(student.blocks[index].mixer(normed).hidden, target).item()
        for index, normed, target in _teacher_forced(source, layers, tokens)
    }


def _teacher_forced(
    source: MemoryLM, layers: Sequence[int], tokens: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block, input and output of its mixer, for each of these blocks of the source."""
    hidden = source.embed(tokens)
    for index, block in enumerate(source.blocks):
        normed = block.mixer_input(hidden)
        target = block.mixer(normed).hidden
        if index in layers:
            yield index, normed, target
        hidden = block.after_mixer(hidden, target)


def _mixer_difference(source: MemoryLM, student: MemoryLM, layers: Sequence[int], tokens: Tensor) -> float:
    """Largest difference between old and new mixers over the largest output of the old one, in float32."""
    largest = 0.0
    for index, normed, _ in _teacher_forced(source, layers, tokens):
        expected, got = (
            copy.deepcopy(model.blocks[index].mixer).float()(normed.float()).hidden
            for model in (source, student)
        )
        largest = max(largest, float((got - expected).abs().max() / expected.abs().max()))
    return largest


@torch.no_grad()
def _scale_down(
    source: MemoryLM, student: MemoryLM, layers: Sequence[int], tokens: Tensor
) -> dict[int, float]:
    """Block -> factor on the output projection of each new mixer that was louder than the old one."""
    free = [index for index in layers if exact_reach(student.config.mixers[index]) == 0]
    scales: dict[int, float] = {}
    if not free:
        return scales
    for index, normed, target in _teacher_forced(source, free, tokens):
        mixer = student.blocks[index].mixer
        projection = getattr(mixer, "o_proj", getattr(mixer, "out_proj", None))
        if not isinstance(projection, nn.Linear):
            continue
        loudness = mixer(normed).hidden.float().square().mean().sqrt()
        scale = float(target.float().square().mean().sqrt() / loudness)
        if scale < 1:  # false for nan as well, which a check of the report names
            scales[index] = scale
            for parameter in projection.parameters():
                parameter.mul_(scale)
    return scales


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Mean squared error over the mean square of the expected values, in float32: equal weight for loud and
    quiet layers.
    """
    expected = expected.float()
    return (actual.float() - expected).square().mean() / expected.square().mean().clamp(min=1e-12)


def _copy_weights(source: MemoryLM, student: MemoryLM, layers: Sequence[int]) -> ParityReport:
    old, new = source.state_dict(), student.state_dict()
    taken: dict[str, Tensor] = {}
    expanded: list[str] = []
    rows: dict[str, int] = {}  # of parameters that are taken over in part: rows that are not
    used: set[str] = set()
    for name in new:
        part = _REPLACED.fullmatch(name)
        if part is None or int(part["layer"]) not in layers:
            taken[name] = old[name]
            used.add(name)
    for index in layers:
        prefix = f"layers.{index}.mixer."
        weights = {name.removeprefix(prefix): old[name] for name in old if name.startswith(prefix)}
        for name, origin in weight_map(source.config.mixers[index], student.config.mixers[index]).items():
            taken[prefix + name], num_fresh = origin.fill(new[prefix + name], weights)
            if num_fresh:
                rows[prefix + name] = num_fresh
            used.update(prefix + read for read in origin.names)
            if origin.has_repeats:
                expanded.append(prefix + name)
    fresh = {
        name: (rows[name], *tensor.shape[1:]) if name in rows else tuple(tensor.shape)
        for name, tensor in new.items()
        if name not in taken or name in rows
    }
    student.load_state_dict({**new, **taken})
    num_taken = sum(tensor.numel() for tensor in taken.values())
    return ParityReport(
        layers=list(layers),
        num_copied=num_taken - sum(math.prod(fresh[name]) for name in rows),
        new_parameters=fresh,
        dropped=sorted(set(old) - used),
        expanded=expanded,
    )
