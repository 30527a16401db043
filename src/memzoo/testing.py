"""The layer contract as checks: `check_mixer` runs them all on any mixer, ours or yours.

    from memzoo.testing import check_mixer
    report = check_mixer({"type": "sliding_window", "d_model": 16, "num_heads": 2, "window_size": 5})

Every check raises `ContractError` (an AssertionError) that names the promise, the largest error and where it is.
The promises are written down in docs/contract.md.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .kernels import use_backend
from .layers import MixerConfig, State, TokenMixer, build_mixer
from .layers.registry import mixer_entry

# Dimensions: B batch rows, T tokens, N sequences, M model width

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest expected value


class ContractError(AssertionError):
    """A mixer broke a promise of the contract."""


@dataclass
class ContractReport:
    """Largest relative error seen per check (0.0 where a check compares bits or counts)."""

    errors: dict[str, float] = field(default_factory=dict)


def small_configs(type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two small configs of unequal sizes for a registered mixer type."""
    first, second = mixer_entry(type).mixer.small_configs()
    return {"type": type, **first}, {"type": type, **second}


def assert_close(name: str, actual: Tensor, expected: Tensor, bound: float) -> float:
    """Compares with a bound relative to max(1, largest expected value) and says where the largest error is.

    Returns:
        The error found.

    Raises:
        ContractError: shapes differ, a value is not finite, or the error exceeds the bound.
    """
    if actual.shape != expected.shape:
        raise ContractError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(actual).all()):
        raise ContractError(f"{name}: holds values that are not finite")
    wide = torch.float64
    difference = (actual.to(wide) - expected.to(wide)).abs()
    scale = max(1.0, float(expected.abs().max()))
    error = float(difference.max()) / scale
    if not error <= bound:
        where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise ContractError(
            f"{name}: error {error:.3g} of the maximum {scale:.3g} at {where}, allowed {bound:.3g}"
        )
    return error


def assert_states_close(name: str, actual: State, expected: State, bound: float) -> float:
    """Compares two states field by field; a growing buffer may have more unused (zero) slots on one side.

    Raises:
        ContractError: fields differ in name, dtype or number.
    """
    left, right = dict(actual.named_tensors()), dict(expected.named_tensors())
    if left.keys() != right.keys():
        raise ContractError(f"{name}: fields {sorted(left)}, expected {sorted(right)}")
    worst = 0.0
    for key in left:
        a, b = left[key], right[key]
        if a.dtype != b.dtype:
            raise ContractError(f"{name}.{key}: dtype {a.dtype}, expected {b.dtype}")
        if a.dim() >= 2 and b.dim() == a.dim() and a.shape[1] != b.shape[1]:
            slots = max(a.shape[1], b.shape[1])
            a, b = _with_slots(a, slots), _with_slots(b, slots)
        worst = max(worst, assert_close(f"{name}.{key}", a, b, bound))
    return worst


# ---------------------------------------------------------------------------------------------- the subject of a check


class Subject:
    """A mixer under test with inputs that fit it.

    Args:
        mixer: the mixer (evaluation mode, any dtype).
        seed: of weights and inputs.
        num_tokens: default at least four times the longest window, chunk or kernel of the mixer, not a multiple of it.
    """

    def __init__(
        self,
        mixer: TokenMixer,
        *,
        dtype: torch.dtype,
        seed: int = 0,
        num_tokens: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.mixer = scatter_parameters(copy.deepcopy(mixer), seed).to(device=device, dtype=dtype).eval()
        self.dtype, self.device = dtype, device
        self.num_tokens = num_tokens if num_tokens is not None else max(4 * mixer.span + 3, 17)

    def inputs(self, batch_size: int, num_tokens: int | None = None) -> Tensor:
        length = self.num_tokens if num_tokens is None else num_tokens
        x = torch.randn(batch_size, length, self.mixer.d_model, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)

    def streams(self, batch_size: int, num_tokens: int | None = None) -> dict[str, Tensor]:
        """Streams the mixer needs. Roles: a head, documents, a question, a tail and a response, as specs of retrieval have them."""
        length = self.num_tokens if num_tokens is None else num_tokens
        made: dict[str, Tensor] = {}
        for name in self.mixer.needs:
            if name == "roles":
                row = _roles(length)
            else:
                row = torch.arange(length) // max(1, self.mixer.segment_size)
            made[name] = row.expand(batch_size, length).to(self.device)
        return made

    def cuts(self, roles: Tensor | None, num_tokens: int) -> list[int]:
        """Places 1..T-1 where the sequence may be cut."""
        places = range(1, num_tokens)
        if self.mixer.exact == "segment":
            return [t for t in places if t % self.mixer.segment_size == 0]
        if self.mixer.exact == "question" and roles is not None:
            return [t for t in places if not (roles[t] == 0 and roles[t - 1] == 0)]
        return list(places)

    def run_pieces(
        self,
        x: Tensor,
        cuts: Sequence[int],
        streams: Mapping[str, Tensor],
        *,
        by_step: bool = True,
        spoil: Callable[[State], State] | None = None,
    ) -> tuple[Tensor, State]:
        """Feeds x in pieces; pieces of one token go through `step`. `spoil` is applied to every carried state."""
        state: Any = self.mixer.init_state(x.shape[0], device=self.device, dtype=self.dtype)
        outputs = []
        bounds = [0, *cuts, x.shape[1]]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            part = {name: stream[:, start:end] for name, stream in streams.items()}
            if end - start == 1 and by_step:
                out = self.mixer.step(x[:, start], state, streams={name: s[:, 0] for name, s in part.items()})
                outputs.append(out.hidden[:, None])
            else:
                out = self.mixer(x[:, start:end], state, streams=part, return_state=True)
                outputs.append(out.hidden)
            state = out.state if spoil is None or end == x.shape[1] else spoil(out.state)
        return torch.cat(outputs, dim=1), state


def scatter_parameters(mixer: TokenMixer, seed: int) -> TokenMixer:
    """Moves every parameter off its initial value, so that zero-initialised gates and biases take part in the checks."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter))
    return mixer


# ---------------------------------------------------------------------------------------------- the checks


def check_streaming(subject: Subject, *, splits: int = 25, seed: int = 0) -> float:
    """Promise 1: any split, down to single tokens, gives the outputs and the final state of the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    bound, worst = TOLERANCE[subject.dtype], 0.0
    lengths = [subject.num_tokens, 1, 2, 3, max(1, subject.mixer.span), subject.mixer.span + 1]
    with torch.no_grad():
        for index in range(splits):
            # most splits on the long sequence; the short lengths take turns
            length = lengths[0] if index % 3 or index == 0 else lengths[1 + (index // 3) % (len(lengths) - 1)]
            x, streams = subject.inputs(2, length), subject.streams(2, length)
            whole = subject.mixer(x, streams=streams, return_state=True)
            roles = streams["roles"][0] if "roles" in streams else None
            places = subject.cuts(roles, length)
            if index == 0:
                cuts = places  # token by token
            elif index % 2:
                cuts = _small_pieces(places, generator)
            else:
                cuts = sorted(_sample(places, int(torch.randint(0, 5, (), generator=generator)), generator))
            got, state = subject.run_pieces(x, cuts, streams, by_step=index % 4 != 3)
            worst = max(
                worst,
                assert_close(
                    f"streaming: outputs of split {cuts} of {length} tokens", got, whole.hidden, bound
                ),
            )
            worst = max(
                worst,
                assert_states_close(
                    f"streaming: final state of split {cuts} of {length} tokens", state, whole.state, bound
                ),
            )
            if state.num_tokens.tolist() != [length] * 2:
                raise ContractError(
                    f"streaming: the state counts {state.num_tokens.tolist()} tokens after {length}"
                )
    return worst


def check_bites(subject: Subject) -> float:
    """Promise 9: with the carried state zeroed at a cut the streaming comparison fails, so it can fail."""
    length = subject.num_tokens
    x, streams = subject.inputs(2), subject.streams(2)
    roles = streams["roles"][0] if "roles" in streams else None
    places = subject.cuts(roles, length)
    cut = places[len(places) // 2]

    def forget(state: State) -> State:
        return state.map(torch.zeros_like, include_host=False)

    with torch.no_grad():
        whole = subject.mixer(x, streams=streams, return_state=True)
        got, _ = subject.run_pieces(x, [cut], streams, spoil=forget)
    error = float((got - whole.hidden).abs().max())
    if not error > 1e-6:
        raise ContractError(
            f"bites: zeroing the state at token {cut} changes outputs by {error:.3g} only: the check cannot fail"
        )
    return 0.0


def check_causality(subject: Subject) -> float:
    """Promise 2: outputs before t are bit-identical when tokens from t on change; the gradient there is exactly zero."""
    length = subject.num_tokens
    x, streams = subject.inputs(2), subject.streams(2)
    with torch.no_grad():
        base = subject.mixer(x, streams=streams).hidden
    for t in sorted({1, length // 3, length // 2, length - 1}):
        start = t
        if subject.mixer.exact == "question" and "roles" in streams:
            while start > 0 and streams["roles"][0, start] == 0 and streams["roles"][0, start - 1] == 0:
                start -= 1  # the tokens of a question are read together
        elif subject.mixer.exact == "segment":
            start = t // subject.mixer.segment_size * subject.mixer.segment_size
        if start == 0:
            continue
        changed = x.clone()
        changed[:, start:] = subject.inputs(2, length - start) * 3
        with torch.no_grad():
            again = subject.mixer(changed, streams=streams).hidden
        if not torch.equal(base[:, :start], again[:, :start]):
            difference = (base[:, :start] - again[:, :start]).abs().flatten(2).amax(-1)
            raise ContractError(
                f"causality: changing tokens from {start} on moves earlier outputs by {float(difference.max()):.3g}, "
                f"first at token {int((difference.amax(0) > 0).nonzero()[0])}"
            )
        leaf = x.clone().requires_grad_()
        subject.mixer(leaf, streams=streams).hidden[:, :start].double().square().sum().backward()
        assert leaf.grad is not None
        if bool((leaf.grad[:, start:] != 0).any()):
            raise ContractError(
                f"causality: the gradient of outputs before {start} reaches tokens from {start} on"
            )
    return 0.0


def check_rows(subject: Subject) -> float:
    """Promise 3: rows of a batch do not influence one another; the state follows a reordering of rows."""
    x, streams = subject.inputs(3), subject.streams(3)
    with torch.no_grad():
        base = subject.mixer(x, streams=streams, return_state=True)
        other = x.clone()
        other[1] = subject.inputs(1)[0] * 5
        again = subject.mixer(other, streams=streams, return_state=True)
        for row in (0, 2):
            if not torch.equal(base.hidden[row], again.hidden[row]):
                raise ContractError(f"rows: changing row 1 moves the outputs of row {row}")
            for key, tensor in base.state.select([row]).named_tensors():
                if not torch.equal(tensor, dict(again.state.select([row]).named_tensors())[key]):
                    raise ContractError(f"rows: changing row 1 moves the state of row {row} ({key})")
        if subject.mixer.exact == "question":
            return 0.0
        order = [2, 0, 1]
        nxt = subject.inputs(3, 1)
        tail = subject.streams(3, 1)
        step_streams = {name: s[:, 0] for name, s in tail.items()}
        straight = subject.mixer.step(nxt[:, 0], base.state, streams=step_streams).hidden
        permuted = subject.mixer.step(nxt[order, 0], base.state.select(order), streams=step_streams).hidden
        if not torch.equal(permuted, straight[order]):
            raise ContractError("rows: a reordered state does not give reordered outputs")
        fewer = subject.mixer.step(
            nxt[[1], 0], base.state.select([1]), streams={n: s[[1]] for n, s in step_streams.items()}
        ).hidden
        return assert_close("rows: one selected row", fewer, straight[[1]], TOLERANCE[subject.dtype])


def check_padding(subject: Subject) -> float:
    """Promise 3: padding on the left, on the right, on both sides and in holes changes nothing, at batch 1 and 4."""
    bound, worst = TOLERANCE[subject.dtype], 0.0
    length = subject.num_tokens
    with torch.no_grad():
        for batch in (1, 4):
            for kind in ("left", "right", "both", "holes"):
                if kind == "holes" and subject.mixer.needs:
                    continue
                x, streams = subject.inputs(batch), subject.streams(batch)
                mask = torch.ones(batch, length, dtype=torch.bool)
                for row in range(batch):
                    pads = 1 + (row * 5 + 3) % max(2, length // 2)
                    if kind in ("left", "both"):
                        mask[row, :pads] = False
                    if kind in ("right", "both"):
                        mask[row, length - (pads + 1) // 2 :] = False
                    if kind == "holes":
                        mask[row, torch.randperm(length, generator=subject.generator)[:pads]] = False
                mask = mask.to(subject.device)
                poisoned = x.clone()
                poisoned[~mask] = float("nan")
                if subject.mixer.needs:  # the real tokens of a padded row are a complete sample of their own
                    streams = _streams_under(mask, subject)
                out = subject.mixer(poisoned, mask=mask, streams=streams, return_state=True)
                for row in range(batch):
                    alone = subject.mixer(
                        x[row][mask[row]][None],
                        streams={name: s[row][mask[row]][None] for name, s in streams.items()},
                        return_state=True,
                    )
                    where = f"padding {kind}, batch {batch}, row {row}"
                    worst = max(
                        worst, assert_close(where, out.hidden[row][mask[row]], alone.hidden[0], bound)
                    )
                    worst = max(
                        worst,
                        assert_states_close(f"{where}: state", out.state.select([row]), alone.state, bound),
                    )
                if bool((out.hidden[~mask] != 0).any()):
                    raise ContractError(f"padding {kind}: outputs at padded positions are not zero")
                if (
                    subject.mixer.exact != "question"
                ):  # continue ragged rows, once by step and once as a padded piece
                    worst = max(
                        worst, _check_ragged_continuation(subject, x, mask, streams, out.state, bound)
                    )
    return worst


def check_packing(subject: Subject) -> float:
    """Promise 3: packed sequences equal separate ones, with and without incoming states; no gradient crosses a boundary."""
    bound, worst = TOLERANCE[subject.dtype], 0.0
    span = subject.mixer.span
    lengths = [subject.num_tokens, 1, span, 0, 2 * span + 1, 3]
    if subject.mixer.needs:
        lengths = [subject.num_tokens, subject.num_tokens - 2, subject.num_tokens + 1]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    pieces = [subject.inputs(1, n) for n in lengths]
    streams = [subject.streams(1, n) for n in lengths]
    packed = torch.cat(pieces, dim=1).requires_grad_()
    packed_streams = {name: torch.cat([s[name] for s in streams], dim=1) for name in subject.mixer.needs}
    out = subject.mixer(packed, cu_seqlens=bounds, streams=packed_streams, return_state=True)
    for i, (piece, stream) in enumerate(zip(pieces, streams, strict=True)):
        with torch.no_grad():
            alone = subject.mixer(piece, streams=stream, return_state=True)
        got = out.hidden[:, bounds[i] : bounds[i + 1]]
        worst = max(
            worst,
            assert_close(f"packing: sequence {i} of {lengths[i]} tokens", got.detach(), alone.hidden, bound),
        )
        state = out.state.select([i]).detach()
        worst = max(worst, assert_states_close(f"packing: state of sequence {i}", state, alone.state, bound))
    for i in (0, len(lengths) - 2):
        (grad,) = torch.autograd.grad(
            out.hidden[:, bounds[i] : bounds[i + 1]].double().square().sum(), packed, retain_graph=True
        )
        outside = torch.ones(packed.shape[1], dtype=torch.bool)
        outside[bounds[i] : bounds[i + 1]] = False
        if bool((grad[:, outside.to(grad.device)] != 0).any()):
            raise ContractError(f"packing: the gradient of sequence {i} reaches another sequence")
    if subject.mixer.exact == "token" and not subject.mixer.needs:
        with torch.no_grad():
            again = [subject.inputs(1, n) for n in lengths[::-1]]
            after = torch.tensor([0, *torch.tensor(lengths[::-1]).cumsum(0).tolist()])
            whole = subject.mixer(
                torch.cat(again, dim=1), out.state.detach(), cu_seqlens=after, return_state=True
            )
            for i in range(len(lengths)):
                alone = subject.mixer(torch.cat([pieces[i], again[i]], dim=1), return_state=True)
                where = f"packing: sequence {i} continued"
                got = whole.hidden[:, after[i] : after[i + 1]]
                worst = max(worst, assert_close(where, got, alone.hidden[:, lengths[i] :], bound))
                worst = max(
                    worst, assert_states_close(f"{where}: state", whole.state.select([i]), alone.state, bound)
                )
    return worst


def check_value(subject: Subject) -> float:
    """Promise 4: a state is a value; donation poisons; select, clone, detach, save and load keep every number."""
    x, streams = subject.inputs(2), subject.streams(2)
    with torch.no_grad():
        state = subject.mixer(x, streams=streams, return_state=True).state
        kept = state.clone()
        nxt, tail = subject.inputs(2, 1), subject.streams(2, 1)
        one = {name: s[:, 0] for name, s in tail.items()}
        plain = subject.mixer.step(nxt[:, 0], state, streams=one)
        if subject.mixer.exact == "token":
            subject.mixer(nxt, state, streams=tail, return_state=True)
        _assert_same_bits("value: the caller's state changed in a call", state, kept)
        donated = subject.mixer.step(nxt[:, 0], state, streams=one, donate=True)
        if not torch.equal(plain.hidden, donated.hidden):
            raise ContractError("value: donate=True changes the outputs")
        _assert_same_bits("value: donate=True changes the new state", donated.state, plain.state)
        try:
            subject.mixer.step(nxt[:, 0], state, streams=one)
        except ValueError:
            pass
        else:
            raise ContractError("value: a donated state can still be used")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            kept.save(path)
            _assert_same_bits("value: save and load", State.load(path, subject.device), kept)
        _assert_same_bits("value: select all rows", kept.select([0, 1]), kept)
        _assert_same_bits("value: to()", kept.to(subject.device), kept)
    carried = subject.mixer(x.clone().requires_grad_(), streams=streams, return_state=True).state
    if any(t.requires_grad for _, t in carried.detach().named_tensors()):
        raise ContractError("value: detach() leaves a tensor in the graph")
    wrong = kept.select([0])
    for call in (
        lambda: subject.mixer(x, wrong, streams=streams),
        lambda: subject.mixer.step(nxt[:, 0], wrong, streams=one),
    ):
        try:
            call()
        except ValueError as error:
            if "batch size" not in str(error):
                raise ContractError(
                    f"value: a state of another batch size gives an unhelpful error: {error}"
                ) from error
        else:
            raise ContractError("value: a state of another batch size is accepted")
    return 0.0


def check_size(subject: Subject, *, lengths: tuple[int, int] = (128, 4096), exact: bool = True) -> float:
    """Promise 5: the declared bytes equal the measured bytes (or bound them, where storage depends on the data)."""
    with torch.no_grad():
        for length in lengths:
            state: Any = None
            x, streams = subject.inputs(1, length), subject.streams(1, length)
            state = subject.mixer(x, streams=streams, return_state=True).state
            declared = subject.mixer.state_num_bytes(length, 1, subject.dtype)
            measured = state.num_bytes()
            if (exact and declared != measured) or measured > declared:
                raise ContractError(f"size: {measured} bytes after {length} tokens, declared {declared}")
        empty = subject.mixer.init_state(3, device=subject.device, dtype=subject.dtype)
        if exact and empty.num_bytes() != subject.mixer.state_num_bytes(0, 3, subject.dtype):
            raise ContractError(
                f"size: an empty state has {empty.num_bytes()} bytes, declared {subject.mixer.state_num_bytes(0, 3, subject.dtype)}"
            )
    return 0.0


def check_flops(subject: Subject, *, lengths: tuple[int, int] = (64, 256)) -> float:
    """Promise 5: declared FLOPs of a step within 5 % of what torch counts."""
    worst = 0.0
    with torch.no_grad():
        for length in lengths:
            state = subject.mixer(
                subject.inputs(1, length), streams=subject.streams(1, length), return_state=True
            ).state
            one = {name: s[:, 0] for name, s in subject.streams(1, 1).items()}
            with FlopCounterMode(display=False) as counter:
                subject.mixer.step(subject.inputs(1, 1)[:, 0], state, streams=one)
            counted, declared = counter.get_total_flops(), subject.mixer.flops_per_token(length)
            error = abs(declared - counted) / max(counted, 1)
            if error > 0.05:
                raise ContractError(
                    f"flops: {counted} counted in a step after {length} tokens, declared {declared}"
                )
            worst = max(worst, error)
    return worst


def check_gradients(subject: Subject) -> float:
    """Promise 6: gradients of input, parameters and incoming state agree with the reference and with finite differences."""
    if subject.dtype != torch.float64:
        raise ValueError(f"gradients are checked in float64, the subject has {subject.dtype}.")
    worst = 0.0
    fast, slow = _gradients(subject, "torch"), _gradients(subject, "reference")
    for name in slow:
        worst = max(worst, assert_close(f"gradients: {name}", fast[name], slow[name], 1e-9))
    if all(float(value.abs().max()) == 0 for name, value in fast.items() if name.startswith("state.")):
        raise ContractError("gradients: nothing flows into the incoming state")

    length = min(subject.mixer.span + 2, 6)
    x = subject.inputs(1, length).requires_grad_()
    streams = subject.streams(1, length)
    names = [name for name, p in subject.mixer.named_parameters() if p.requires_grad]
    parameters = [p for p in subject.mixer.parameters() if p.requires_grad]

    def function(inputs: Tensor, *values: Tensor) -> Tensor:
        call = torch.func.functional_call(
            subject.mixer, dict(zip(names, values, strict=True)), (inputs,), {"streams": streams}
        )
        return call.hidden

    if not torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, raise_exception=False):
        raise ContractError("gradients: autograd and finite differences disagree")
    return worst


def check_bfloat16(mixer: TokenMixer, *, seed: int = 0, device: str = "cpu") -> float:
    """Promise 7: bf16 in, bf16 out, error at most twice that of the reference in bf16; nothing but finite values."""
    low = Subject(mixer, dtype=torch.bfloat16, seed=seed, device=device)
    high = Subject(mixer, dtype=torch.float32, seed=seed, device=device)
    high.mixer.load_state_dict(
        {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in low.mixer.state_dict().items()}
    )
    x, streams = low.inputs(2), low.streams(2)
    with torch.no_grad():
        with use_backend("reference"):
            truth = high.mixer(x.float(), streams=streams).hidden
            reference = low.mixer(x, streams=streams).hidden
        out = low.mixer(x, streams=streams, return_state=True)
        if out.hidden.dtype != torch.bfloat16:
            raise ContractError(f"bfloat16: the output is {out.hidden.dtype}")
        error = float((out.hidden.float() - truth).abs().max())
        allowed = 2 * float((reference.float() - truth).abs().max()) + 1e-6
        if not error <= allowed:
            raise ContractError(f"bfloat16: error {error:.3g}, allowed {allowed:.3g} (twice the reference's)")
        for dtype, subject in ((torch.bfloat16, low), (torch.float32, high)):
            for name, value in (("zero", 0.0), ("constant", 1.0), ("huge", 1e4), ("tiny", 1e-20)):
                out = subject.mixer(
                    torch.full_like(subject.inputs(1), value), streams=subject.streams(1), return_state=True
                )
                finite = bool(torch.isfinite(out.hidden).all())
                finite = finite and all(bool(torch.isfinite(t).all()) for _, t in out.state.named_tensors())
                if not finite:
                    raise ContractError(f"bfloat16: {name} input gives values that are not finite in {dtype}")
    return error / max(allowed, 1e-30)


def check_tooling(subject: Subject) -> float:
    """Promise 8: state_dict, meta device, deepcopy, checkpointing, autocast, T = 0."""
    mixer = subject.mixer
    x, streams = subject.inputs(2), subject.streams(2)
    with torch.no_grad():
        base = mixer(x, streams=streams).hidden
        other = build_mixer(mixer.config) if not _is_foreign(mixer) else copy.deepcopy(mixer)
        other = other.to(subject.device, subject.dtype).eval()
        other.load_state_dict(mixer.state_dict())
        if not torch.equal(other(x, streams=streams).hidden, base):
            raise ContractError("tooling: a state_dict round trip changes the outputs")
        if not torch.equal(copy.deepcopy(mixer)(x, streams=streams).hidden, base):
            raise ContractError("tooling: deepcopy changes the outputs")
        if not _is_foreign(mixer):
            with torch.device("meta"):
                empty = build_mixer(mixer.config)
            empty = empty.to_empty(device=subject.device)
            for parameter in empty.parameters():
                parameter.fill_(float("nan"))
            empty.reset_parameters()
            if any(not bool(torch.isfinite(t).all()) for t in empty.state_dict().values()):
                raise ContractError("tooling: reset_parameters leaves values of a meta module unset")
            empty = empty.to(subject.dtype).eval()
            empty.load_state_dict(mixer.state_dict())
            if not torch.equal(empty(x, streams=streams).hidden, base):
                raise ContractError(
                    "tooling: a module materialised from the meta device computes something else"
                )
        nothing = mixer(x[:, :0], streams={n: s[:, :0] for n, s in streams.items()}, return_state=True)
        if nothing.hidden.shape != (2, 0, mixer.d_model):
            raise ContractError(f"tooling: T = 0 gives shape {tuple(nothing.hidden.shape)}")
        fresh = mixer.init_state(2, device=subject.device, dtype=subject.dtype)
        _assert_same_bits("tooling: T = 0 changes the state", nothing.state, fresh)

    def grads(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        mixer.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad, [p.grad.clone() for p in mixer.parameters() if p.grad is not None]

    plain = grads(lambda leaf: mixer(leaf, streams=streams).hidden)
    saved = grads(
        lambda leaf: checkpoint(lambda t: mixer(t, streams=streams).hidden, leaf, use_reentrant=False)
    )
    same = torch.equal(plain[0], saved[0]) and all(
        torch.equal(a, b) for a, b in zip(plain[1], saved[1], strict=True)
    )
    if not same:
        raise ContractError("tooling: gradient checkpointing changes gradients")
    if subject.dtype == torch.float32:
        with torch.autocast(subject.device, dtype=torch.bfloat16):
            out = mixer(x, streams=streams, return_state=True)
            one = {n: s[:, 0] for n, s in subject.streams(2, 1).items()}
            mixer.step(x[:, 0], out.state, streams=one)
        assert_close("tooling: autocast", out.hidden.float(), base, 0.1)
    mixer.zero_grad()
    return 0.0


def check_compile(subject: Subject) -> float:
    """Promise 8: the unmasked, unpacked training forward compiles as one graph and keeps its numbers."""
    x, streams = subject.inputs(2), subject.streams(2)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: subject.mixer(t, streams=streams).hidden, fullgraph=True, backend="aot_eager"
    )
    leaf = x.clone().requires_grad_()
    out = compiled(leaf)
    out.square().sum().backward()
    return assert_close(
        "compile", out.detach(), subject.mixer(x, streams=streams).hidden.detach(), TOLERANCE[subject.dtype]
    )


def check_mixer(
    mixer: TokenMixer | MixerConfig | Mapping[str, Any],
    *,
    splits: int | None = None,
    seed: int = 0,
    exact_size: bool = True,
    compile: bool = True,
    device: str = "cpu",
) -> ContractReport:
    """Runs every check of the contract.

    Args:
        mixer: a mixer, or the config of a registered one. It is copied, never changed.
        splits: random splits per dtype (default: the environment variable MEMZOO_SPLITS, else 25).
        seed: of weights, inputs and splits.
        exact_size: False where the state's size depends on the data; then the declared size is a bound.
        compile: include torch.compile (a few seconds).
        device: where the mixer runs, such as "cuda".

    Raises:
        ContractError: the first broken promise.
    """
    if not isinstance(mixer, nn.Module):
        mixer = build_mixer(mixer)
    report = ContractReport()
    for name, check in contract_checks(
        mixer, splits=splits, seed=seed, exact_size=exact_size, compile=compile, device=device
    ).items():
        report.errors[name] = check()
    return report


def contract_checks(
    mixer: TokenMixer,
    *,
    splits: int | None = None,
    seed: int = 0,
    exact_size: bool = True,
    compile: bool = True,
    device: str = "cpu",
) -> dict[str, Callable[[], float]]:
    """The checks of `check_mixer` by name, ready to be called one by one."""
    splits = int(os.environ.get("MEMZOO_SPLITS", "25")) if splits is None else splits
    checks: dict[str, Callable[[], float]] = {}
    for dtype in (torch.float64, torch.float32):
        short = str(dtype).removeprefix("torch.")

        def subject(dtype: torch.dtype = dtype) -> Subject:
            return Subject(mixer, dtype=dtype, seed=seed, device=device)

        checks[f"streaming-{short}"] = lambda make=subject: check_streaming(make(), splits=splits, seed=seed)
        checks[f"causality-{short}"] = lambda make=subject: check_causality(make())
        checks[f"rows-{short}"] = lambda make=subject: check_rows(make())
        checks[f"padding-{short}"] = lambda make=subject: check_padding(make())
        checks[f"packing-{short}"] = lambda make=subject: check_packing(make())
        checks[f"tooling-{short}"] = lambda make=subject: check_tooling(make())
    single = lambda: Subject(mixer, dtype=torch.float32, seed=seed, device=device)  # noqa: E731
    double = lambda: Subject(mixer, dtype=torch.float64, seed=seed, device=device)  # noqa: E731
    checks["bites"] = lambda: check_bites(double())
    checks["value"] = lambda: check_value(single())
    checks["size"] = lambda: check_size(single(), exact=exact_size)
    checks["flops"] = lambda: check_flops(single())
    checks["gradients"] = lambda: check_gradients(double())
    checks["bfloat16"] = lambda: check_bfloat16(mixer, seed=seed, device=device)
    if compile:
        checks["compile"] = lambda: check_compile(single())
    return checks


# ---------------------------------------------------------------------------------------------- helpers


def _with_slots(tensor: Tensor, slots: int) -> Tensor:
    missing = slots - tensor.shape[1]
    return (
        tensor
        if missing == 0
        else torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
    )


def _sample(places: list[int], count: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(places), generator=generator)[: min(count, len(places))]
    return [places[i] for i in order.tolist()]


def _small_pieces(places: list[int], generator: torch.Generator) -> list[int]:
    """Cuts that leave pieces of one to three tokens in a random stretch and long pieces elsewhere."""
    if not places:
        return []
    start = int(torch.randint(0, len(places), (), generator=generator))
    cuts, index = [], start
    while index < min(len(places), start + 12):
        cuts.append(places[index])
        index += int(torch.randint(1, 4, (), generator=generator))
    return cuts


def _roles(length: int) -> Tensor:
    """Template head, two to three documents, a question, a template tail and a response."""
    if length < 12:
        return torch.full((length,), -1)
    question, tail = max(2, length // 6), 1
    response = max(2, length // 6)
    documents = length - 1 - question - tail - response
    first = documents // 2 + 1
    parts = [-2] + [1] * first + [2] * (documents - first) + [0] * question + [-2] * tail + [-1] * response
    return torch.tensor(parts)


def _streams_under(mask: Tensor, subject: Subject) -> dict[str, Tensor]:
    made = {}
    for name in subject.mixer.needs:
        stream = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
        for row in range(mask.shape[0]):
            stream[row, mask[row]] = subject.streams(1, int(mask[row].sum()))[name][0]
        made[name] = stream
    return made


def _check_ragged_continuation(
    subject: Subject, x: Tensor, mask: Tensor, streams: Mapping[str, Tensor], state: State, bound: float
) -> float:
    """Rows that have read different numbers of tokens go on by a step, a dense piece and a padded piece."""
    batch, worst = x.shape[0], 0.0
    if subject.mixer.exact == "segment":
        return 0.0
    extra = subject.inputs(batch, 6)
    more = subject.streams(batch, 6)
    keep = torch.ones(batch, 6, dtype=torch.bool, device=x.device)
    keep[0, 4:] = False
    first = subject.mixer.step(extra[:, 0], state, streams={n: s[:, 0] for n, s in more.items()})
    middle = subject.mixer(
        extra[:, 1:3], first.state, streams={n: s[:, 1:3] for n, s in more.items()}, return_state=True
    )
    last = subject.mixer(
        extra[:, 3:],
        middle.state,
        mask=keep[:, 3:],
        streams={n: s[:, 3:] for n, s in more.items()},
        return_state=True,
    )
    got = torch.cat([first.hidden[:, None], middle.hidden, last.hidden], dim=1)
    for row in range(batch):
        tokens = torch.cat([x[row][mask[row]], extra[row][keep[row]]])[None]
        joined = {n: torch.cat([streams[n][row][mask[row]], more[n][row][keep[row]]])[None] for n in streams}
        alone = subject.mixer(tokens, streams=joined, return_state=True)
        start = int(mask[row].sum())
        where = f"padding: row {row} of a ragged batch continued"
        worst = max(worst, assert_close(where, got[row][keep[row]], alone.hidden[0, start:], bound))
        worst = max(
            worst, assert_states_close(f"{where}: state", last.state.select([row]), alone.state, bound)
        )
    return worst


def _assert_same_bits(name: str, actual: State, expected: State) -> None:
    left, right = dict(actual.named_tensors()), dict(expected.named_tensors())
    if type(actual) is not type(expected) or left.keys() != right.keys():
        raise ContractError(f"{name}: another structure")
    for key in left:
        if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key]):
            raise ContractError(f"{name}: {key} differs")


def _gradients(subject: Subject, backend: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    start = subject.mixer.span + 1
    past = torch.randn(2, start, subject.mixer.d_model, generator=generator, dtype=subject.dtype).to(
        subject.device
    )
    x = torch.randn(
        2, subject.num_tokens, subject.mixer.d_model, generator=generator, dtype=subject.dtype
    ).to(subject.device)
    streams = subject.streams(2, start + subject.num_tokens)
    cut = {n: s[:, :start] for n, s in streams.items()}, {n: s[:, start:] for n, s in streams.items()}
    with torch.no_grad(), use_backend(backend):
        state = subject.mixer(past, streams=cut[0], return_state=True).state
    state = state.map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    x.requires_grad_()
    subject.mixer.zero_grad()
    with use_backend(backend):
        out = subject.mixer(x, state, streams=cut[1], return_state=True)
        loss = (
            out.hidden
            * torch.randn(out.hidden.shape, generator=generator, dtype=subject.dtype).to(subject.device)
        ).sum()
        for _, tensor in out.state.named_tensors():
            if tensor.is_floating_point() and tensor.requires_grad:
                loss = (
                    loss
                    + (
                        tensor
                        * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                    ).sum()
                )
        loss.backward()
    found = {"x": x.grad}
    found |= {f"parameter {n}": p.grad for n, p in subject.mixer.named_parameters() if p.requires_grad}
    found |= {f"state.{n}": t.grad for n, t in state.named_tensors() if t.is_floating_point()}
    missing = [name for name, grad in found.items() if grad is None and name.startswith("parameter")]
    if missing:
        raise ContractError(f"gradients: none for {missing}")
    return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}


def _is_foreign(mixer: TokenMixer) -> bool:
    """Whether the mixer is not registered and so cannot be rebuilt from its config."""
    try:
        return mixer_entry(mixer.config.type).mixer is not type(mixer)
    except ValueError:
        return True
