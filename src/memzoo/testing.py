"""The layer contract as checks: `check_mixer` runs them all on any mixer, ours or yours.

    from memzoo.testing import check_mixer
    report = check_mixer({"type": "sliding_window", "d_model": 16, "num_heads": 2, "window_size": 5})

Every check raises `ContractError` (an AssertionError) that names the promise, the largest error and where it
is. The promises are written down in docs/contract.md. `contract_checks` gives the checks one by one, for a
parametrised test.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .kernels import use_backend
from .layers import LayerOutput, MixerConfig, State, TokenMixer, build_mixer
from .layers.contract.context import OVERRIDES
from .layers.registry import mixer_entry

# Dimensions: B batch rows, T tokens, N sequences, M model width

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest expected value


def _added_product_flops(
    total: Sequence[int], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any
) -> int:
    """FLOPs of total (B, I, K) += left (B, I, J) @ right (B, J, K), from the shapes."""
    return 2 * left[0] * left[1] * left[2] * right[2]


_IN_PLACE_PRODUCTS = {torch.ops.aten.baddbmm_: _added_product_flops}  # torch's counter leaves it out


class ContractError(AssertionError):
    """A mixer broke a promise of the contract."""


@dataclass
class ContractReport:
    """Largest relative error seen per check (0.0 where a check compares bits or counts)."""

    errors: dict[str, float] = field(default_factory=dict)


def small_configs(type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two small configs of unequal sizes for a registered mixer type."""
    first, second = mixer_entry(type).small_configs()
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
    difference = (actual.detach().to(wide) - expected.detach().to(wide)).abs()
    scale = max(1.0, float(expected.detach().abs().max()))
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


# ------------------------------------------------------------------ the subject of a check


class Subject:
    """A copy of a mixer under test, with inputs that fit it.

    Args:
        mixer: the mixer.
        dtype: of parameters and inputs.
        seed: of weights and inputs.
        num_tokens: default more than four times the longest window, chunk or kernel of the mixer, and not a
            multiple of it.
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
        """The streams that the mixer needs for whole samples of `num_tokens` tokens.

        `roles` are a head, documents (of other lengths in every row), a question, a tail and a response.
        """
        length = self.num_tokens if num_tokens is None else num_tokens
        made: dict[str, Tensor] = {}
        for name in self.mixer.needs:
            if name == "roles":
                rows = [_roles(length, row) for row in range(batch_size)]
                made[name] = torch.stack(rows) if rows else torch.zeros(0, length, dtype=torch.int64)
            else:
                made[name] = (torch.arange(length) // self.mixer.segment_size).expand(batch_size, length)
            made[name] = made[name].to(self.device)
        return made

    def more_streams(self, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
        """The streams of tokens that follow a whole sample."""
        fill = {name: -1 if name == "roles" else 0 for name in self.mixer.needs}
        shape = (batch_size, num_tokens)
        return {name: torch.full(shape, value, device=self.device) for name, value in fill.items()}

    def cuts(self, streams: Mapping[str, Tensor], num_tokens: int) -> list[int]:
        """Places 1..T-1 where the sequences may be cut."""
        places = range(1, num_tokens)
        if self.mixer.exact == "segment":
            return [t for t in places if t % self.mixer.segment_size == 0]
        if self.mixer.exact == "question" and "roles" in streams:
            inside = ((streams["roles"][:, 1:] == 0) & (streams["roles"][:, :-1] == 0)).any(0).tolist()
            return [t for t in places if not inside[t - 1]]
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
        """Feeds x in pieces, single tokens through `step`; `spoil` is applied to every carried state."""
        state: Any = self.mixer.init_state(x.shape[0], device=self.device, dtype=self.dtype)
        outputs = []
        bounds = [0, *cuts, x.shape[1]]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            part = {name: stream[:, start:end] for name, stream in streams.items()}
            if end - start == 1 and by_step:
                out = self.mixer.step(x[:, start], state, streams=first_token(part))
                outputs.append(out.hidden[:, None])
            else:
                out = self.mixer(x[:, start:end], state, streams=part, return_state=True)
                outputs.append(out.hidden)
            state = out.state if spoil is None or end == x.shape[1] else spoil(out.state)
        return torch.cat(outputs, dim=1), state


def first_token(streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The streams (N,) that `step` takes, from streams (N, T)."""
    return {name: stream[:, 0] for name, stream in streams.items()}


def scatter_parameters(mixer: TokenMixer, seed: int) -> TokenMixer:
    """Moves every parameter off its initial value, so that gates that start at zero take part."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter))
    return mixer


# ------------------------------------------------------------------ the checks


def check_streaming(subject: Subject, *, splits: int = 25, seed: int = 0) -> float:
    """Promise 1: any split, down to single tokens, gives the outputs and the state of the whole."""
    generator = torch.Generator().manual_seed(seed)
    bound, worst = TOLERANCE[subject.dtype], 0.0
    span = subject.mixer.span
    short = [1, 2, 3, span, span + 1]
    with torch.no_grad():
        for index in range(splits):
            # the length that the mixer asks for; in turn the short lengths, and any length up to 200
            length = subject.num_tokens
            if index % 4 == 2:
                length = short[index // 4 % len(short)]
            elif index % 4 == 3:
                length = int(torch.randint(1, 201, (), generator=generator))
            x, streams = subject.inputs(2, length), subject.streams(2, length)
            whole = subject.mixer(x, streams=streams, return_state=True)
            narrow = [name for name, t in _float_tensors(whole.state) if t.dtype != subject.dtype]
            if narrow:
                raise ContractError(
                    f"streaming: the state keeps {narrow} in another precision than {subject.dtype}"
                )
            places = subject.cuts(streams, length)
            if index == 0:
                cuts = places  # token by token
            elif index % 2:
                cuts = _small_pieces(places, generator)
            else:
                cuts = sorted(_sample(places, int(torch.randint(0, 5, (), generator=generator)), generator))
            got, state = subject.run_pieces(x, cuts, streams, by_step=index % 5 != 3)
            where = f"of split {cuts} of {length} tokens"
            error = assert_close(f"streaming: outputs {where}", got, whole.hidden, bound)
            worst = max(worst, error)
            error = assert_states_close(f"streaming: final state {where}", state, whole.state, bound)
            worst = max(worst, error)
            if state.num_tokens.tolist() != [length] * 2:
                raise ContractError(
                    f"streaming: the state counts {state.num_tokens.tolist()} tokens after {length}"
                )
    return worst


def check_bites(subject: Subject) -> float:
    """Promise 9: zeroing the carried state at a cut changes outputs, so the streaming check can fail."""
    x, streams = subject.inputs(2), subject.streams(2)
    places = subject.cuts(streams, subject.num_tokens)
    cut = places[len(places) // 2]

    def forget(state: State) -> State:
        return state.map(torch.zeros_like, include_host=False)

    with torch.no_grad():
        whole = subject.mixer(x, streams=streams, return_state=True)
        if not _float_tensors(whole.state):
            return 0.0  # nothing is remembered
        got, _ = subject.run_pieces(x, [cut], streams, spoil=forget)
    error = float((got - whole.hidden).abs().max())
    if not error > 1e-6:
        raise ContractError(
            f"bites: zeroing the state at token {cut} changes outputs by {error:.3g} only: the streaming "
            "check cannot fail"
        )
    return 0.0


def check_causality(subject: Subject) -> float:
    """Promise 2: changing tokens from t on keeps every bit before t; no gradient reaches them."""
    length = subject.num_tokens
    x, streams = subject.inputs(2), subject.streams(2)
    with torch.no_grad():
        base = subject.mixer(x, streams=streams).hidden
    places = subject.cuts(streams, length)  # tokens that are read together may see one another
    for start in sorted({places[0], places[len(places) // 3], places[len(places) // 2], places[-1]}):
        changed = x.clone()
        changed[:, start:] = subject.inputs(2, length - start) * 3
        with torch.no_grad():
            again = subject.mixer(changed, streams=streams).hidden
        if not torch.equal(base[:, :start], again[:, :start]):
            difference = (base[:, :start] - again[:, :start]).abs().flatten(2).amax(-1).amax(0)
            raise ContractError(
                f"causality: changing tokens from {start} on moves earlier outputs by "
                f"{float(difference.max()):.3g}, first at token {int((difference > 0).nonzero()[0])}"
            )
        leaf = x.clone().requires_grad_()
        out = subject.mixer(leaf, streams=streams, return_state=start == places[0]).hidden
        out[:, :start].double().square().sum().backward()
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
            assert_states_close(
                f"rows: changing row 1 moves the state of row {row}",
                again.state.select([row]),
                base.state.select([row]),
                0.0,
            )
        if subject.mixer.exact == "segment" and subject.num_tokens % subject.mixer.segment_size:
            return 0.0
        order = [2, 0, 1]
        nxt, tail = subject.inputs(3, 1), first_token(subject.more_streams(3, 1))
        straight = subject.mixer.step(nxt[:, 0], base.state, streams=tail).hidden
        permuted = subject.mixer.step(nxt[order, 0], base.state.select(order), streams=tail).hidden
        # not to the bit: a matrix product on a CPU may treat rows in groups
        bound = TOLERANCE[subject.dtype]
        error = assert_close("rows: a reordered state", permuted, straight[order], bound)
        fewer = subject.mixer.step(
            nxt[[1], 0], base.state.select([1]), streams={name: s[[1]] for name, s in tail.items()}
        ).hidden
        return max(error, assert_close("rows: one selected row", fewer, straight[[1]], bound))


def check_restart(subject: Subject) -> float:
    """Promise 3: a row may begin anew beside rows that go on; it is then as one that never read anything."""
    mixer, bound = subject.mixer, TOLERANCE[subject.dtype]
    length = subject.num_tokens // mixer.segment_size * mixer.segment_size
    x, streams = subject.inputs(3, length), subject.streams(3, length)
    with torch.no_grad():
        state = mixer(x, streams=streams, return_state=True).state
    rows = torch.tensor([False, True, False])
    empty = mixer.init_state(3, device=subject.device, dtype=subject.dtype)
    begun = state.restart(rows, empty)
    learned = [name for name, tensor in empty.named_tensors() if tensor.requires_grad]
    if learned != [name for name, tensor in begun.named_tensors() if tensor.requires_grad]:
        raise ContractError(f"restart: the learned memories {learned} lose their gradient")
    for row, source in enumerate((state, empty, state)):
        name = f"restart: row {row} of the state"
        assert_states_close(name, begun.select([row]), source.select([row]), 0.0)
    with torch.no_grad():
        more, goes_on = subject.inputs(3, length), subject.more_streams(3, length)
        fresh = subject.streams(3, length)
        mixed = {name: torch.where(rows.to(s.device)[:, None], fresh[name], s) for name, s in goes_on.items()}
        got = mixer(more, begun, streams=mixed, return_state=True)
        alone = mixer(more, streams=fresh, return_state=True)
        kept = mixer(more, state, streams=goes_on, return_state=True)
        worst = 0.0
        for row, wanted in enumerate((kept, alone, kept)):
            name = f"restart: row {row}"
            worst = max(worst, assert_close(name, got.hidden[row], wanted.hidden[row], bound))
            states = got.state.select([row]), wanted.state.select([row])
            worst = max(worst, assert_states_close(f"{name}: state", *states, bound))
    return worst


def check_padding(subject: Subject) -> float:
    """Promise 3: padding on the left, the right, both sides or in holes changes nothing."""
    bound, worst = TOLERANCE[subject.dtype], 0.0
    length = subject.num_tokens
    with torch.no_grad():
        for batch in (1, 4):
            for kind in ("left", "right", "both", "holes"):
                x = subject.inputs(batch)
                mask = _padding_mask(batch, length, kind, subject.generator).to(subject.device)
                streams = _streams_under(mask, subject)  # the real tokens of a row are a sample of their own
                poisoned = x.masked_fill(~mask[..., None], float("nan"))
                out = subject.mixer(poisoned, mask=mask, streams=streams, return_state=True)
                for row in range(batch):
                    alone = subject.mixer(
                        x[row][mask[row]][None],
                        streams={name: s[row][mask[row]][None] for name, s in streams.items()},
                        return_state=True,
                    )
                    where = f"padding {kind}, batch {batch}, row {row}"
                    error = assert_close(where, out.hidden[row][mask[row]], alone.hidden[0], bound)
                    worst = max(worst, error)
                    error = assert_states_close(
                        f"{where}: state", out.state.select([row]), alone.state, bound
                    )
                    worst = max(worst, error)
                if bool((out.hidden[~mask] != 0).any()):
                    raise ContractError(f"padding {kind}: outputs at padded positions are not zero")
                if subject.mixer.exact != "segment":
                    worst = max(worst, _check_ragged_continuation(subject, x, mask, streams, out.state))
    return worst


def check_packing(subject: Subject) -> float:
    """Promise 3: packed sequences equal separate ones, and no gradient crosses a boundary."""
    bound, worst = TOLERANCE[subject.dtype], 0.0
    span, length = subject.mixer.span, subject.num_tokens
    lengths = [length, 1, span, 0, 2 * span + 1, 3]
    if subject.mixer.needs:
        lengths = [length, length - 2, 0, length + 1]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    pieces = [subject.inputs(1, n) for n in lengths]
    streams = [subject.streams(2, n) for n in lengths]
    streams = [{name: s[[i % 2]] for name, s in item.items()} for i, item in enumerate(streams)]
    packed = torch.cat(pieces, dim=1).requires_grad_()
    packed_streams = {name: torch.cat([s[name] for s in streams], dim=1) for name in subject.mixer.needs}
    out = subject.mixer(packed, cu_seqlens=bounds, streams=packed_streams, return_state=True)
    for i, (piece, stream) in enumerate(zip(pieces, streams, strict=True)):
        with torch.no_grad():
            alone = subject.mixer(piece, streams=stream, return_state=True)
        got = out.hidden[:, bounds[i] : bounds[i + 1]]
        where = f"packing: sequence {i} of {lengths[i]} tokens"
        worst = max(worst, assert_close(where, got.detach(), alone.hidden, bound))
        state = out.state.select([i]).detach()
        worst = max(worst, assert_states_close(f"{where}: state", state, alone.state, bound))
    for i in (0, len(lengths) - 1):
        (grad,) = torch.autograd.grad(
            out.hidden[:, bounds[i] : bounds[i + 1]].double().square().sum(), packed, retain_graph=True
        )
        outside = torch.ones(packed.shape[1], dtype=torch.bool)
        outside[bounds[i] : bounds[i + 1]] = False
        if bool((grad[:, outside.to(grad.device)] != 0).any()):
            raise ContractError(f"packing: the gradient of sequence {i} reaches another sequence")
    if subject.mixer.exact == "segment":
        return worst
    with torch.no_grad():
        again = [subject.inputs(1, n) for n in lengths[::-1]]
        more = [subject.more_streams(1, n) for n in lengths[::-1]]
        after = torch.tensor([0, *torch.tensor(lengths[::-1]).cumsum(0).tolist()])
        whole = subject.mixer(
            torch.cat(again, dim=1),
            out.state.detach(),
            cu_seqlens=after,
            streams={name: torch.cat([s[name] for s in more], dim=1) for name in subject.mixer.needs},
            return_state=True,
        )
        for i in range(len(lengths)):
            joined = {name: torch.cat([streams[i][name], more[i][name]], dim=1) for name in streams[i]}
            alone = subject.mixer(torch.cat([pieces[i], again[i]], dim=1), streams=joined, return_state=True)
            where = f"packing: sequence {i} continued"
            got = whole.hidden[:, after[i] : after[i + 1]]
            worst = max(worst, assert_close(where, got, alone.hidden[:, lengths[i] :], bound))
            error = assert_states_close(f"{where}: state", whole.state.select([i]), alone.state, bound)
            worst = max(worst, error)
    return worst


def check_value(subject: Subject) -> float:
    """Promise 4: a state is a value, donation poisons, and all ways to copy keep every number."""
    length = subject.num_tokens // subject.mixer.segment_size * subject.mixer.segment_size
    x, streams = subject.inputs(2, length), subject.streams(2, length)
    with torch.no_grad():
        state = subject.mixer(x, streams=streams, return_state=True).state
        kept = state.clone()
        nxt, tail = subject.inputs(2, 4), subject.more_streams(2, 4)
        one = first_token(tail)
        plain = subject.mixer.step(nxt[:, 0], state, streams=one)
        subject.mixer(nxt, state, streams=tail, return_state=True)
        empty = subject.mixer(
            nxt[:, :0], state, streams={n: s[:, :0] for n, s in tail.items()}, return_state=True
        ).state
        _assert_same_bits("value: the caller's state changed in a call", state, kept)
        _assert_same_bits("value: T = 0 changes the state", empty, kept)

        # whatever a new state shares with an older one must survive when the new one is given away
        fresh = plain.state.clone()
        current, expected = plain.state, plain.state.clone()
        for t in range(1, 4):
            if subject.mixer.segment_size > 1:
                break
            step = {name: s[:, t] for name, s in tail.items()}
            donated = subject.mixer.step(nxt[:, t], current, streams=step, donate=True)
            undonated = subject.mixer.step(nxt[:, t], expected, streams=step)
            if not torch.equal(donated.hidden, undonated.hidden):
                raise ContractError("value: donate=True changes the outputs")
            _assert_same_bits("value: donate=True changes the new state", donated.state, undonated.state)
            current, expected = donated.state, undonated.state
        subject.mixer.step(nxt[:, 0], empty, streams=one, donate=True)
        _assert_same_bits("value: giving a later state away changes an earlier one", state, kept)
        given = state.clone()
        donated = subject.mixer.step(nxt[:, 0], given, streams=one, donate=True)
        if not torch.equal(plain.hidden, donated.hidden):
            raise ContractError("value: donate=True changes the outputs")
        _assert_same_bits("value: donate=True changes the new state", donated.state, fresh)
        for use in (
            lambda: subject.mixer.step(nxt[:, 0], given, streams=one),
            lambda: subject.mixer(nxt, given, streams=tail),
            lambda: given.clone(),
        ):
            _assert_refused("value: a donated state can still be used", use, "donate")

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            kept.save(path)
            _assert_same_bits("value: save and load", State.load(path, subject.device), kept)
        _assert_same_bits("value: select all rows", kept.select([0, 1]), kept)
        _assert_same_bits("value: to()", kept.to(subject.device), kept)
        leaves, tree = pytree.tree_flatten(kept)
        _assert_same_bits("value: as a pytree", pytree.tree_unflatten(leaves, tree), kept)
    carried = subject.mixer(x.clone().requires_grad_(), streams=streams, return_state=True).state
    if any(t.requires_grad for _, t in carried.detach().named_tensors()):
        raise ContractError("value: detach() leaves a tensor in the graph")
    wrong = kept.select([0])
    for call in (
        lambda: subject.mixer(nxt, wrong, streams=tail),
        lambda: subject.mixer.step(nxt[:, 0], wrong, streams=one),
    ):
        _assert_refused("value: a state of another batch size is accepted", call, "batch size")
    return 0.0


def check_extras(subject: Subject) -> float:
    """Promise 4: asking for more changes no output; extras follow the tokens, aux sums add up."""
    bound, worst = TOLERANCE[subject.dtype], 0.0
    x, streams = subject.inputs(2), subject.streams(2)
    places = subject.cuts(streams, subject.num_tokens)
    bounds = [0, places[len(places) // 3], places[len(places) // 2], subject.num_tokens]
    with torch.no_grad():
        plain = subject.mixer(x, streams=streams)
        base = subject.mixer(x, streams=streams, return_state=True, return_extras=True)
        error = assert_close("extras: asking for state and extras", base.hidden, plain.hidden, bound)
        worst = max(worst, error)
        if plain.state is not None or plain.extras:
            raise ContractError("extras: state or extras are returned without being asked for")
        parts: list[LayerOutput] = []
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            state = parts[-1].state if parts else None
            piece = {name: s[:, start:end] for name, s in streams.items()}
            parts.append(
                subject.mixer(x[:, start:end], state, streams=piece, return_state=True, return_extras=True)
            )
        mask = _padding_mask(2, subject.num_tokens, "both", subject.generator).to(subject.device)
        under = _streams_under(mask, subject)
        padded = subject.mixer(x, mask=mask, streams=under, return_extras=True)
        alone = [
            subject.mixer(
                x[row][mask[row]][None],
                streams={name: s[row][mask[row]][None] for name, s in under.items()},
                return_extras=True,
            )
            for row in range(2)
        ]
    for name, value in base.extras.items():
        pieces = torch.cat([part.extras[name] for part in parts], dim=1)
        worst = max(worst, assert_close(f"extras: {name} in pieces", pieces, value, bound))
        for row in range(2):
            got = padded.extras[name][row][mask[row]]
            error = assert_close(f"extras: {name} under padding", got, alone[row].extras[name][0], bound)
            worst = max(worst, error)
    for name, (total, count) in base.aux.items():
        if total.shape != (2,) or count.shape != (2,):
            raise ContractError(f"extras: aux {name} must be a sum and a count of shape (N,)")
        for i, whole in enumerate((total, count)):
            pieces = torch.stack([part.aux[name][i] for part in parts]).sum(0)
            worst = max(worst, assert_close(f"extras: aux {name} in pieces", pieces, whole, bound))
            single = torch.cat([item.aux[name][i] for item in alone])
            error = assert_close(f"extras: aux {name} under padding", padded.aux[name][i], single, bound)
            worst = max(worst, error)
    if base.extras:
        out = subject.mixer(x, streams=streams, return_extras=True)
        for name, value in out.extras.items():
            grads = torch.autograd.grad(
                value.double().square().sum(),
                [p for p in subject.mixer.parameters() if p.requires_grad],
                allow_unused=True,
                retain_graph=True,
            )
            if not any(grad is not None and bool((grad != 0).any()) for grad in grads):
                raise ContractError(f"extras: no gradient flows from {name} to a parameter")
    return worst


def check_size(subject: Subject, *, lengths: tuple[int, int] = (128, 4096)) -> float:
    """Promise 5: the declared bytes equal the measured bytes (or bound them, for a data-dependent mixer)."""
    mixer = subject.mixer
    exact = not mixer.data_dependent
    with torch.no_grad():
        for dtype, batch, length in (
            (subject.dtype, 2, lengths[0]),
            (torch.bfloat16, 1, lengths[0]),
            (subject.dtype, 1, lengths[1]),
        ):
            mixer.to(dtype)
            x, streams = subject.inputs(batch, length).to(dtype), subject.streams(batch, length)
            state: Any = mixer(x, streams=streams, return_state=True).state
            declared, measured = mixer.state_num_bytes(length, batch, dtype), state.num_bytes()
            if (exact and declared != measured) or measured > declared:
                raise ContractError(
                    f"size: {measured} bytes after {length} tokens of batch {batch} in {dtype}, "
                    f"declared {declared}"
                )
            mixer.to(subject.dtype)
        empty = mixer.init_state(3, device=subject.device, dtype=subject.dtype).num_bytes()
        declared = mixer.state_num_bytes(0, 3, subject.dtype)
        if (exact and empty != declared) or empty > declared:
            raise ContractError(f"size: an empty state has {empty} bytes, declared {declared}")
    return 0.0


def check_flops(subject: Subject, *, lengths: tuple[int, int] = (64, 256)) -> float:
    """Promise 5: declared FLOPs of a step are within 5 % of what torch counts (or bound it)."""
    worst = 0.0
    mixer = subject.mixer
    with torch.no_grad():
        for length in lengths:
            length = length // mixer.segment_size * mixer.segment_size
            state: Any = mixer(
                subject.inputs(1, length), streams=subject.streams(1, length), return_state=True
            ).state
            one = first_token(subject.more_streams(1, 1))
            with FlopCounterMode(display=False, custom_mapping=_IN_PLACE_PRODUCTS) as counter:
                mixer.step(subject.inputs(1, 1)[:, 0], state, streams=one)
            counted, declared = counter.get_total_flops(), mixer.flops_per_token(length)
            error = (declared - counted) / max(counted, 1)
            if error < -0.05 or (error > 0.05 and not mixer.data_dependent):
                raise ContractError(
                    f"flops: {counted} counted in a step after {length} tokens, declared {declared}"
                )
            worst = max(worst, -error if mixer.data_dependent else abs(error))
    return worst


def check_gradients(subject: Subject) -> float:
    """Promise 6: gradients are those of the reference, and flow through carried states."""
    if subject.dtype != torch.float64:
        raise ValueError(f"gradients are checked in float64, the subject has {subject.dtype}.")
    worst = 0.0
    mixer = subject.mixer
    fast, slow = _gradients(subject, "torch"), _gradients(subject, "reference")
    if fast.keys() != slow.keys():
        raise ContractError(f"gradients: of {sorted(fast)}, the reference has {sorted(slow)}")
    for name in slow:
        worst = max(worst, assert_close(f"gradients: {name}", fast[name], slow[name], 1e-9))
    carried = [value for name, value in fast.items() if name.startswith("state.")]
    if carried and not any(bool((value != 0).any()) for value in carried):
        raise ContractError("gradients: nothing flows into the incoming state")

    # a chain of calls has the gradient of one call
    x, streams = subject.inputs(1), subject.streams(1)
    places = subject.cuts(streams, subject.num_tokens)
    weight = torch.randn(x.shape, generator=subject.generator, dtype=torch.float64).to(x)
    leaves = [x.requires_grad_(), *(p for p in mixer.parameters() if p.requires_grad)]
    names = ["x", *(n for n, p in mixer.named_parameters() if p.requires_grad)]
    found = []
    for cuts in ([], places[len(places) // 4 :: max(1, len(places) // 3)]):
        hidden, _ = subject.run_pieces(x, cuts, streams)
        grads = torch.autograd.grad((hidden * weight).sum(), leaves, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)])
    for name, whole, chained in zip(names, *found, strict=True):
        worst = max(worst, assert_close(f"gradients: {name} through carried states", chained, whole, 1e-9))

    length = max(2 * mixer.span + 1, 14 if mixer.needs else 0)
    x = subject.inputs(1, length).requires_grad_()
    streams = subject.streams(1, length)

    def function(inputs: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(
            mixer,
            dict(zip(names[1:], values, strict=True)),
            (inputs,),
            {"streams": streams, "return_extras": True},
        )
        return out.hidden, *out.extras.values()

    if not torch.autograd.gradcheck(function, (x, *leaves[1:]), fast_mode=True, raise_exception=False):
        raise ContractError("gradients: autograd and finite differences disagree")
    return worst


def check_bfloat16(mixer: TokenMixer, *, seed: int = 0, device: str = "cpu") -> float:
    """Promise 7: bf16 in, bf16 out; error at most twice (gradient three times) that of the reference in bf16.

    Both the largest and the root mean square error, over enough rows that a kink (a value on the other side
    of a threshold) cannot decide alone. Whatever accumulates is kept in float32: in the state, a tensor of
    the activation dtype may only hold
        stored vectors.
    """
    low = Subject(mixer, dtype=torch.bfloat16, seed=seed, device=device)
    high = Subject(mixer, dtype=torch.float32, seed=seed, device=device)
    high.mixer.load_state_dict(low.mixer.state_dict())
    x, streams = low.inputs(16), low.streams(16)
    weight = torch.randn(x.shape, generator=low.generator).to(device)

    def run(subject: Subject, backend: str | None) -> tuple[Tensor, Tensor]:
        leaf = x.to(subject.dtype).clone().requires_grad_()
        with use_backend(backend or "auto"):
            out = subject.mixer(leaf, streams=streams).hidden
        if out.dtype != subject.dtype:
            raise ContractError(f"bfloat16: {subject.dtype} in, {out.dtype} out")
        (grad,) = torch.autograd.grad((out.float() * weight).sum(), leaf)
        return out.detach().float(), grad.float()

    worst = 0.0
    results = zip(run(low, None), run(low, "reference"), run(high, "reference"), (2, 3), strict=True)
    for name, (got, reference, truth, factor) in zip(("output", "gradient"), results, strict=True):
        for kind, size in (("largest", _largest), ("mean square", _root_mean_square)):
            error = size(got - truth)
            allowed = factor * size(reference - truth) + 1e-6
            if not error <= allowed:
                raise ContractError(
                    f"bfloat16: {kind} error {error:.3g} of the {name}, allowed {allowed:.3g} "
                    f"({factor} times the reference's)"
                )
            worst = max(worst, error / allowed)
    with torch.no_grad():
        if mixer.segment_size == 1:
            _check_stored_vectors(low)
        for subject in (low, high):
            for name, value in (("zero", 0.0), ("constant", 1.0), ("huge", 1e4), ("tiny", 1e-20)):
                full = torch.full_like(subject.inputs(1), value)
                out = subject.mixer(full, streams=subject.streams(1), return_state=True)
                tensors = [("output", out.hidden), *_float_tensors(out.state)]
                broken = [key for key, tensor in tensors if not bool(torch.isfinite(tensor).all())]
                if broken:
                    raise ContractError(
                        f"bfloat16: {name} input gives values that are not finite in {subject.dtype}: "
                        f"{broken}"
                    )
    return worst


def check_tooling(subject: Subject) -> float:
    """Promise 8: state_dict, meta device, deepcopy, checkpointing, autocast, T = 0."""
    mixer = subject.mixer
    x, streams = subject.inputs(2), subject.streams(2)
    with torch.no_grad():
        base = mixer(x, streams=streams).hidden
        other = _rebuild(mixer).to(subject.device, subject.dtype).eval()
        other.load_state_dict(mixer.state_dict())
        if not torch.equal(other(x, streams=streams).hidden, base):
            raise ContractError("tooling: a state_dict round trip changes the outputs")
        if not torch.equal(copy.deepcopy(mixer)(x, streams=streams).hidden, base):
            raise ContractError("tooling: deepcopy changes the outputs")
        with torch.device("meta"):
            empty = _rebuild(mixer)
        empty = empty.to_empty(device=subject.device)
        for tensor in empty.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        empty.reset_parameters()
        unset = [name for name, t in empty.state_dict().items() if not bool(torch.isfinite(t).all())]
        if unset:
            raise ContractError(
                f"tooling: reset_parameters leaves values of a module from the meta device unset: {unset}"
            )
        empty = empty.to(subject.dtype).eval()
        empty.load_state_dict(mixer.state_dict())
        if not torch.equal(empty(x, streams=streams).hidden, base):
            raise ContractError("tooling: a module from the meta device computes something else")
        nothing = mixer(x[:, :0], streams={n: s[:, :0] for n, s in streams.items()}, return_state=True)
        if nothing.hidden.shape != (2, 0, mixer.d_model):
            raise ContractError(f"tooling: T = 0 gives shape {tuple(nothing.hidden.shape)}")
        fresh = mixer.init_state(2, device=subject.device, dtype=subject.dtype)
        _assert_same_bits("tooling: T = 0 changes the state", nothing.state, fresh)
        for rows, cu_seqlens in ((0, None), (1, torch.zeros(1, dtype=torch.int64))):
            none = {n: s[:rows, : 3 - 3 * rows] for n, s in streams.items()}
            out = mixer(
                x[:rows, : 3 - 3 * rows],
                fresh.select([]),
                cu_seqlens=cu_seqlens,
                streams=none,
                return_state=True,
            )
            _assert_same_bits("tooling: a batch without rows", out.state, fresh.select([]))
        mixer.step(x[:0, 0], fresh.select([]), streams=first_token({n: s[:0] for n, s in streams.items()}))
        if mixer.init_state(2, device="meta").batch_size != 2:
            raise ContractError("tooling: init_state on the meta device has another batch size")

    def grads(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *(p for p in mixer.parameters() if p.requires_grad)]
        found = torch.autograd.grad(call(leaf).square().sum(), leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]

    plain = grads(lambda leaf: mixer(leaf, streams=streams).hidden)
    saved = grads(
        lambda leaf: checkpoint(lambda t: mixer(t, streams=streams).hidden, leaf, use_reentrant=False)
    )
    if not all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True)):
        raise ContractError("tooling: gradient checkpointing changes gradients")
    if subject.dtype == torch.float32:
        with torch.autocast(torch.device(subject.device).type, dtype=torch.bfloat16):
            out = mixer(x, streams=streams, return_state=True)
            if mixer.segment_size == 1:
                mixer.step(x[:, 0], out.state, streams=first_token(subject.more_streams(2, 1)))
        assert_close("tooling: autocast", out.hidden.float(), base, 0.1)
    return 0.0


def check_overrides(subject: Subject) -> float:
    """Promise 8: a size that a call replaces acts like that size in the config; others are refused."""
    mixer, worst = subject.mixer, 0.0
    x, streams = subject.inputs(2), subject.streams(2)
    for name in OVERRIDES:
        if name not in mixer.overridable:
            _assert_refused(
                f"overrides: {name} is accepted though not listed in `overridable`",
                partial(mixer, x, streams=streams, overrides={name: 2}),
                name,
            )
            continue
        for value in (1, 4):
            config = _with_size(mixer.config, name, value)
            other = _rebuild(mixer, config).to(subject.device, subject.dtype).eval()
            other.load_state_dict(mixer.state_dict())
            with torch.no_grad():
                got = mixer(x, streams=streams, overrides={name: value}).hidden
                expected = other(x, streams=streams).hidden
            where = f"overrides: {name}={value}"
            worst = max(worst, assert_close(where, got, expected, TOLERANCE[subject.dtype]))
    return worst


def check_interface(mixer: TokenMixer, device: str = "cpu") -> None:
    """What all other checks take for granted: the methods are there, and give a state and a LayerOutput."""
    if not isinstance(mixer, TokenMixer):
        what = "the class " + mixer.__name__ if isinstance(mixer, type) else type(mixer).__name__
        raise ContractError(
            f"interface: a mixer is an instance of TokenMixer, got {what}. Give MyMixer(config), or the "
            "config of a registered mixer."
        )
    kind = type(mixer)
    for method in ("init_weights", "init_state", "mix", "flops_per_token"):
        if getattr(kind, method) is getattr(TokenMixer, method):
            raise ContractError(f"interface: {kind.__name__} does not implement {method}")
    subject = Subject(mixer, dtype=torch.float32, device=device)
    with torch.no_grad():
        empty = _without_crash("interface", partial(subject.mixer.init_state, 2, device=device))
        if not isinstance(empty, State):
            raise ContractError(
                f"interface: init_state of {kind.__name__} must return a State, got {type(empty).__name__}"
            )
        x, streams = subject.inputs(2), subject.streams(2)
        out = _without_crash("interface", partial(subject.mixer, x, streams=streams, return_state=True))
    if type(out.state) is not type(empty):
        raise ContractError(
            f"interface: mix of {kind.__name__} must return the new state when ctx.return_state is set, a "
            f"{type(empty).__name__}, got {type(out.state).__name__}. Write LayerOutput(hidden, state)."
        )


def check_compile(subject: Subject) -> float:
    """Promise 8: the training forward compiles as one graph and keeps numbers and gradients."""
    length = max(subject.mixer.span + 2, 12 if subject.mixer.needs else 0)
    x, streams = subject.inputs(2, length), subject.streams(2, length)
    bound = TOLERANCE[subject.dtype]

    def run(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return out.detach(), grad

    plain = run(lambda t: subject.mixer(t, streams=streams).hidden)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(
            lambda t: subject.mixer(t, streams=streams).hidden, fullgraph=True, backend="aot_eager"
        )
        found = run(compiled)
    except torch._dynamo.exc.TorchDynamoException as failure:
        raise ContractError(f"compile: the training forward is not one graph: {failure}") from failure
    finally:
        torch._dynamo.reset()
    error = assert_close("compile: outputs", found[0], plain[0], bound)
    return max(error, assert_close("compile: gradient", found[1], plain[1], bound))


def check_mixer(
    mixer: TokenMixer | MixerConfig | Mapping[str, Any],
    *,
    splits: int | None = None,
    seed: int = 0,
    compile: bool = True,
    device: str = "cpu",
) -> ContractReport:
    """Runs every check of the contract.

    Args:
        mixer: a mixer (registered or not), or the config of a registered one. It is copied, never changed.
        splits: random splits per dtype (default: the environment variable MEMZOO_SPLITS, else 25).
        seed: of weights, inputs and splits.
        compile: include torch.compile (a few seconds).
        device: where the mixer runs, such as "cuda".

    Raises:
        ContractError: the first broken promise.
    """
    if isinstance(mixer, (Mapping, MixerConfig)):
        mixer = build_mixer(mixer)
    check_interface(mixer, device)
    report = ContractReport()
    for name, check in contract_checks(
        mixer, splits=splits, seed=seed, compile=compile, device=device
    ).items():
        report.errors[name] = check()
    return report


def contract_checks(
    mixer: TokenMixer,
    *,
    splits: int | None = None,
    seed: int = 0,
    compile: bool = True,
    device: str = "cpu",
) -> dict[str, Callable[[], float]]:
    """The checks of `check_mixer` by name, ready to be called one by one; each returns its largest error."""
    splits = int(os.environ.get("MEMZOO_SPLITS", "25")) if splits is None else splits
    single = lambda: Subject(mixer, dtype=torch.float32, seed=seed, device=device)  # noqa: E731
    double = lambda: Subject(mixer, dtype=torch.float64, seed=seed, device=device)  # noqa: E731
    checks: dict[str, Callable[[], float]] = {}
    for short, make in (("float64", double), ("float32", single)):
        for name, check in (
            ("streaming", partial(check_streaming, splits=splits, seed=seed)),
            ("padding", check_padding),
            ("packing", check_packing),
        ):
            checks[f"{name}-{short}"] = partial(_check_made, check, make)
    checks["bites"] = lambda: check_bites(double())
    checks["causality"] = lambda: check_causality(single())
    checks["rows"] = lambda: check_rows(double())
    checks["restart"] = lambda: check_restart(double())
    checks["value"] = lambda: check_value(single())
    checks["extras"] = lambda: check_extras(double())
    checks["size"] = lambda: check_size(single())
    checks["flops"] = lambda: check_flops(single())
    checks["gradients"] = lambda: check_gradients(double())
    checks["bfloat16"] = lambda: check_bfloat16(mixer, seed=seed, device=device)
    checks["tooling"] = lambda: check_tooling(single())
    checks["overrides"] = lambda: check_overrides(double())
    if compile:
        checks["compile"] = lambda: check_compile(single())
    return {name: partial(_without_crash, name, check) for name, check in checks.items()}


# ------------------------------------------------------------------ helpers


def _without_crash(name: str, check: Callable[[], Any]) -> Any:
    """Runs a check; what the mixer stumbles over is a broken promise too."""
    try:
        return check()
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{name}: the mixer stopped with {type(error).__name__}: {error}") from error


def _check_made(check: Callable[[Subject], float], make: Callable[[], Subject]) -> float:
    return check(make())


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


def _roles(length: int, row: int) -> Tensor:
    """Template head, three documents, question, template tail, response; plain text when short."""
    if length < 12:
        return torch.full((length,), -1)
    question = response = max(2, length // 6)
    documents = length - 2 - question - response
    first = 1 + (documents // 3 + row) % (documents - 2)
    second = 1 + (documents - first) // 3
    parts = [-2] + [1] * first + [2] * second + [3] * (documents - first - second)
    return torch.tensor(parts + [0] * question + [-2] + [-1] * response)


def _padding_mask(batch: int, length: int, kind: str, generator: torch.Generator) -> Tensor:
    """(B, T) bool; every row has another number of real tokens, one row of a holed batch of four has none."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        pads = 1 + (row * 5 + 3) % max(2, length // 2)
        if kind in ("left", "both"):
            mask[row, :pads] = False
        if kind in ("right", "both"):
            mask[row, length - (pads + 1) // 2 :] = False
        if kind == "holes":
            mask[row, torch.randperm(length, generator=generator)[: length if row == 2 else pads]] = False
    return mask


def _streams_under(mask: Tensor, subject: Subject) -> dict[str, Tensor]:
    made = {}
    for name in subject.mixer.needs:
        stream = torch.full(mask.shape, 7, dtype=torch.int64, device=mask.device)  # under padding: anything
        for row in range(mask.shape[0]):
            stream[row, mask[row]] = subject.streams(row + 1, int(mask[row].sum()))[name][row]
        made[name] = stream
    return made


def _check_ragged_continuation(
    subject: Subject, x: Tensor, mask: Tensor, streams: Mapping[str, Tensor], state: State
) -> float:
    """Rows that have read different numbers of tokens go on by a step, a dense piece and a padded piece."""
    batch, worst, bound = x.shape[0], 0.0, TOLERANCE[subject.dtype]
    extra, more = subject.inputs(batch, 6), subject.more_streams(batch, 6)
    keep = torch.ones(batch, 6, dtype=torch.bool, device=x.device)
    keep[0, 4:] = False
    first = subject.mixer.step(extra[:, 0], state, streams=first_token(more))
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
        error = assert_states_close(f"{where}: state", last.state.select([row]), alone.state, bound)
        worst = max(worst, error)
    return worst


def _check_stored_vectors(subject: Subject) -> None:
    """In a step, a tensor of the activation dtype gains the vectors of one slot, no more."""
    x, streams = subject.inputs(1), subject.streams(1)
    state: Any = subject.mixer(x, streams=streams, return_state=True).state
    for _ in range(3):
        one = first_token(subject.more_streams(1, 1))
        after: Any = subject.mixer.step(subject.inputs(1, 1)[:, 0], state, streams=one).state
        before = dict(state.named_tensors())
        held = [tensor for tensor in before.values() if tensor.dtype == subject.dtype and tensor.dim() > 2]
        for name, tensor in after.named_tensors():
            if tensor.dtype != subject.dtype:
                continue
            if tensor.dim() < 3:
                raise ContractError(
                    f"bfloat16: {name} keeps {subject.dtype} and has shape {tuple(tensor.shape)}. What "
                    "accumulates must be float32; stored tokens lie along dimension 1, as (N, slots, width)."
                )
            # what moves from one place of the state to another was stored before
            alike = [other for other in held if other.shape[-1] == tensor.shape[-1]]
            known = set[tuple[float, ...]]().union(*map(_vectors, alike))
            new = _vectors(tensor)
            per_slot = math.prod(tensor.shape[2:-1])
            if len(new - known) > per_slot:
                raise ContractError(
                    f"bfloat16: {name} keeps {subject.dtype} but a step writes {len(new - known)} vectors, "
                    f"a slot has {per_slot}. "
                    "What accumulates must be float32; stored tokens lie along dimension 1."
                )
        state = after


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _vectors(tensor: Tensor) -> set[tuple[float, ...]]:
    """The vectors (last dimension) of the first row that are not zero, which marks an empty slot."""
    return {tuple(vector) for vector in tensor[0].flatten(0, -2).tolist() if any(vector)}


def _assert_refused(name: str, call: Callable[[], object], word: str) -> None:
    """The call must raise ValueError with a message that holds `word`."""
    try:
        call()
    except ValueError as error:
        if word not in str(error):
            raise ContractError(f"{name}: refused with an unhelpful message: {error}") from error
    else:
        raise ContractError(name)


def _assert_same_bits(name: str, actual: State, expected: State) -> None:
    left, right = dict(actual.named_tensors()), dict(expected.named_tensors())
    if type(actual) is not type(expected) or left.keys() != right.keys():
        raise ContractError(f"{name}: another structure")
    for key in left:
        if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key]):
            raise ContractError(f"{name}: {key} differs")


def _float_tensors(state: State) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in state.named_tensors() if tensor.is_floating_point()]


def _gradients(subject: Subject, backend: str) -> dict[str, Tensor]:
    """Gradients of a random functional of all results by input, parameters and incoming state."""
    generator = torch.Generator().manual_seed(99)
    mixer = subject.mixer
    start = (mixer.span // mixer.segment_size + 1) * mixer.segment_size
    length = subject.num_tokens
    # a sample with roles is cut before its question
    streams = subject.streams(2, start + length)
    start = next(t for t in subject.cuts(streams, start + length) if t >= start)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=subject.dtype).to(subject.device)

    tokens = noise(2, length + start, mixer.d_model)
    x = tokens[:, start:].clone().requires_grad_()
    past = {name: s[:, :start] for name, s in streams.items()}
    rest = {name: s[:, start:] for name, s in streams.items()}
    rest = {name: s[:, : x.shape[1]] for name, s in rest.items()}
    with torch.no_grad(), use_backend(backend):
        state: Any = mixer(tokens[:, :start], streams=past, return_state=True).state
    state = state.map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    with use_backend(backend):
        out = mixer(x, state, streams=rest, return_state=True, return_extras=True)
    loss = (out.hidden * noise(*out.hidden.shape)).sum()
    losses = [total for total, _ in out.aux.values()]
    for tensor in (*out.extras.values(), *(t for _, t in _float_tensors(out.state)), *losses):
        factors = noise(*tensor.shape).to(tensor)  # drawn for all: backends may differ in what has a gradient
        if tensor.requires_grad:
            loss = loss + (tensor * factors).sum()
    leaves = {"x": x}
    leaves |= {f"parameter {name}": p for name, p in mixer.named_parameters() if p.requires_grad}
    leaves |= {f"state.{name}": tensor for name, tensor in _float_tensors(state)}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = dict(zip(leaves, found, strict=True))
    missing = [name for name, grad in grads.items() if grad is None and not name.startswith("state.")]
    if missing:
        # a learned empty memory acts through the state that a sequence starts with, and through nothing else
        empty = [tensor for _, tensor in _float_tensors(mixer.init_state(2)) if tensor.requires_grad]
        total = torch.stack([loss.new_zeros(()).requires_grad_(), *(tensor.sum() for tensor in empty)]).sum()
        reached = torch.autograd.grad(total, [leaves[name] for name in missing], allow_unused=True)
        learned = [name for name, grad in zip(missing, reached, strict=True) if grad is not None]
        grads = {name: grad for name, grad in grads.items() if name not in learned}
        missing = [name for name in missing if name not in learned]
    if missing:
        raise ContractError(f"gradients: none for {missing}")
    return {name: grad.detach() for name, grad in grads.items() if grad is not None}


def _rebuild(mixer: TokenMixer, config: MixerConfig | None = None) -> TokenMixer:
    """A new mixer of the same class from a config (default: its own)."""
    config = mixer.config if config is None else config
    try:
        registered = mixer_entry(config.type).mixer is type(mixer)
    except ValueError:
        registered = False
    return build_mixer(config) if registered else type(mixer)(config)


def _with_size(config: MixerConfig, name: str, value: int) -> MixerConfig:
    """The config with one size replaced, also in the mixers inside."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        inner = getattr(config, item.name)
        if item.name == name:
            changes[name] = value
        elif isinstance(inner, tuple) and any(isinstance(part, MixerConfig) for part in inner):
            changes[item.name] = tuple(_with_size(part, name, value) for part in inner)
    return dataclasses.replace(config, **changes)
