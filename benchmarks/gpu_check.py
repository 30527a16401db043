"""Check and time kernels, layers and models on a CUDA device; write benchmarks/records/gpu_check.json.

    make gpu-check                                        everything, on the GPU
    python benchmarks/gpu_check.py --only kernels/        one part; or any piece of a check's name
    python benchmarks/gpu_check.py --resume               go on where a run was cut off
    python benchmarks/gpu_check.py --device cpu --quick   try this script without a GPU

Parts: *kernels* holds every backend that runs here to the reference (gpu_cases.py); *mixers* runs the
contract on both small configs of every registered mixer and compares the device with the CPU; *models* does
the same for a small `MemoryLM` of each mixer; *training* takes 1,000 steps in bfloat16; *timing* times
kernels and layers beside SDPA. A new mixer enters by being registered; an operation without cases fails.

A failed check never stops the run. The exit code is 1 when one failed and 2 when there is no such device.

It needs torch, numpy, safetensors and pyyaml, no network and no installation: PYTHONPATH=src is enough.
src/memzoo reaches the code folders through relative links, so a copy of the tree must keep links as links
(git, tar and rsync do; the tests run this script from such a copy); the script says so where they are lost.
In a copy without the folder .git, give the commit by --commit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

try:
    import memzoo.layers
except ImportError as error:
    print(
        f"memzoo cannot be imported ({error}). Run in the root of the repository with PYTHONPATH=src, and "
        "see that src/memzoo/kernels, layers and models are links to folders: a copy may have lost them.",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import common
import gpu_timing
from gpu_cases import CASES

from memzoo.kernels import available_backends
from memzoo.kernels.backend import OPERATIONS
from memzoo.layers import build_mixer, list_mixers
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.records import read_record
from memzoo.testing import (
    ContractError,
    Subject,
    assert_close,
    assert_states_close,
    contract_checks,
    small_configs,
)

NAME = "gpu_check"
QUICK_CHECKS = 10  # of each part, spread evenly
SAVE_EVERY_S = 10.0
TRAINING_SIZES = {
    **gpu_timing.FULL_SIZES,
    "d_model": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "window_size": 256,
}


@dataclass(frozen=True)
class Check:
    """One check: `run` returns its largest error, or raises."""

    name: str
    run: Callable[[], float]
    may_refuse: bool = False  # a ValueError says that a backend does not cover the call


# ---------------------------------------------------------------------------------------------- kernels


def kernel_checks(device: torch.device, quick: bool) -> Iterable[Check]:
    """Every case with every backend that runs here, in float64, float32 and bfloat16."""
    for operation in OPERATIONS:
        cases = [case for case in CASES if case.operation == operation]
        if not cases:
            yield Check(
                f"kernels/{operation}", lambda op=operation: _fail(f"no case of {op!r} in gpu_cases.py")
            )
        for backend in ("auto", *available_backends(operation)):
            own = backend in ("auto", "reference", "torch")
            covered: list[str] = []
            for case in cases:
                for dtype in _dtypes(backend):

                    def run(case=case, backend=backend, dtype=dtype, covered=covered) -> float:
                        _poison(device)
                        error = case.check(backend, dtype, device)
                        covered.append(case.name)
                        return error

                    name = f"kernels/{operation}/{backend}/{case.name}/{_short(dtype)}"
                    yield Check(name, run, may_refuse=not own)
            if not own and not quick:
                yield Check(
                    f"kernels/{operation}/{backend}/covers a case",
                    lambda covered=covered: 0.0 if covered else _fail("the backend refused every case"),
                )


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    if backend == "reference":
        return (torch.float32,)
    if backend == "torch":
        return (torch.float64, torch.float32, torch.bfloat16)
    return (torch.float32, torch.bfloat16)


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations on a GPU will be given."""
    if device.type == "cuda":
        blocks = [torch.full((size,), float("nan"), device=device) for size in (1 << 24, 1 << 17, 1 << 17)]
        del blocks


def _fail(message: str) -> float:
    raise ContractError(message)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- mixers


def mixer_checks(device: torch.device, splits: int) -> Iterable[Check]:
    """The contract on both small configs of every registered mixer, and agreement with the CPU."""
    for kind in list_mixers():
        for index, config in enumerate(small_configs(kind)):
            mixer = build_mixer(config)
            for name, check in contract_checks(mixer, splits=splits, device=str(device)).items():
                yield Check(f"mixers/{kind} {index}/{name}", check)
            yield Check(
                f"mixers/{kind} {index}/like the CPU", lambda mixer=mixer: _same_as_cpu(mixer, device)
            )


def _same_as_cpu(mixer: memzoo.layers.TokenMixer, device: torch.device) -> float:
    """Outputs, state and gradients in float64 agree with those of the CPU."""
    found = []
    for place in ("cpu", str(device)):
        subject = Subject(mixer, dtype=torch.float64, device=place)
        x, streams = subject.inputs(2).requires_grad_(), subject.streams(2)
        out = subject.mixer(x, streams=streams, return_state=True)
        out.hidden.square().sum().backward()
        grads = {name: p.grad for name, p in subject.mixer.named_parameters() if p.grad is not None}
        found.append((out, {"x": x.grad, **grads}))
    (expected, expected_grads), (actual, actual_grads) = found
    worst = assert_close("outputs", actual.hidden.detach().cpu(), expected.hidden.detach(), 1e-10)
    states = (out.state.detach().to("cpu") for out in (actual, expected))
    worst = max(worst, assert_states_close("state", *states, 1e-10))
    for name, grad in expected_grads.items():
        worst = max(worst, assert_close(f"gradient {name}", actual_grads[name].cpu(), grad, 1e-9))
    return worst


# ---------------------------------------------------------------------------------------------- models


def model_checks(device: torch.device) -> Iterable[Check]:
    """A `MemoryLM` of two blocks of each mixer."""
    for kind in list_mixers():
        for name, check in (
            ("streaming", _model_streaming),
            ("packing", _model_packing),
            ("bfloat16", _model_bfloat16),
            ("like the CPU", _model_same_as_cpu),
        ):
            yield Check(f"models/{kind}/{name}", lambda check=check, kind=kind: check(kind, device))


def _model(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[MemoryLM, Subject]:
    """A model whose weights depend on `kind` alone, and a subject that knows streams and lengths."""
    layer = small_configs(kind)[0]
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=61,
        d_model=layer["d_model"],
        layers=layer,
        num_layers=2,
        mlp={"type": "swiglu", "d_ff": 24},
    )
    model = MemoryLM(config).to(device, dtype).eval()
    return model, Subject(build_mixer(layer), dtype=dtype, device=str(device))


def _tokens(subject: Subject, rows: int, length: int | None = None) -> Tensor:
    """Random ids (B, T), the same on every device."""
    length = subject.num_tokens if length is None else length
    return torch.randint(61, (rows, length), generator=subject.generator).to(subject.device)


@torch.no_grad()
def _model_streaming(kind: str, device: torch.device) -> float:
    """Pieces and single tokens give the logits of the whole, float32."""
    model, subject = _model(kind, device, torch.float32)
    ids, streams = _tokens(subject, 2), subject.streams(2)
    length = ids.shape[1]
    whole = model(ids, streams=streams).logits
    places = subject.cuts(streams["roles"][0] if "roles" in streams else None, length)
    cuts = [0, *places[len(places) // 3 : len(places) // 3 + 5], places[-1], length]
    state, parts = model.init_state(2, device=device), []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = {name: stream[:, start:end] for name, stream in streams.items()}
        if end - start == 1:
            one = {name: stream[:, 0] for name, stream in part.items()}
            out = model.step(ids[:, start], state, streams=one)
            parts.append(out.logits[:, None])
        else:
            out = model(ids[:, start:end], state, streams=part, return_state=True)
            parts.append(out.logits)
        state = out.state
    return assert_close("logits", torch.cat(parts, 1), whole, 1e-5)


@torch.no_grad()
def _model_packing(kind: str, device: torch.device) -> float:
    """Packed sequences, and padded ones, give the logits of each alone, float32."""
    model, subject = _model(kind, device, torch.float32)
    lengths = [subject.num_tokens, subject.num_tokens - 2]
    rows = [_tokens(subject, 1, length) for length in lengths]
    streams = [subject.streams(1, length) for length in lengths]
    alone = torch.cat([model(row, streams=own).logits for row, own in zip(rows, streams, strict=True)], 1)
    joined = {name: torch.cat([own[name] for own in streams], 1) for name in streams[0]}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(torch.cat(rows, 1), cu_seqlens=bounds, streams=joined).logits
    worst = assert_close("packed logits", packed, alone, 1e-5)
    if not subject.mixer.needs:
        padded = torch.cat([rows[0], torch.cat([rows[1].new_zeros(1, 2), rows[1]], 1)])
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[1, :2] = False
        logits = model(padded, mask=mask).logits
        worst = max(worst, assert_close("padded logits", logits[mask][None], alone, 1e-5))
    return worst


def _model_bfloat16(kind: str, device: torch.device) -> float:
    """Five training steps in bfloat16 stay finite and lower the loss on a repeated batch."""
    model, subject = _model(kind, device, torch.float32)
    ids, streams = _tokens(subject, 2), subject.streams(2)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(ids, streams=streams).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not all(torch.isfinite(p).all() for p in model.parameters()) or not losses[-1] < losses[0]:
        raise ContractError(f"training in bfloat16: losses {losses}, or weights that are not finite")
    return 0.0


@torch.no_grad()
def _model_same_as_cpu(kind: str, device: torch.device) -> float:
    """Logits in float64 agree with those of the CPU."""
    logits = []
    for place in (torch.device("cpu"), device):
        model, subject = _model(kind, place, torch.float64)
        logits.append(model(_tokens(subject, 2), streams=subject.streams(2)).logits.cpu())
    return assert_close("logits", logits[1], logits[0], 1e-10)


# ---------------------------------------------------------------------------------------------- training


def training_checks(device: torch.device, quick: bool) -> Iterable[Check]:
    """Long training in bfloat16 of two blocks of each mixer: no value may ever be other than finite."""
    steps, tokens = (2, 64) if quick else (1000, 2048)
    sizes = gpu_timing.QUICK_SIZES if quick else TRAINING_SIZES
    for kind in list_mixers():
        yield Check(
            f"training/{kind}/{steps} steps of {tokens} tokens",
            lambda kind=kind: _train(kind, device, sizes, steps, tokens),
        )


def _train(kind: str, device: torch.device, sizes: Mapping[str, int], steps: int, tokens: int) -> float:
    layer = gpu_timing.scaled_config(kind, sizes)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=512,
        d_model=sizes["d_model"],
        layers=layer,
        num_layers=2,
        mlp={"type": "swiglu", "d_ff": 2 * sizes["d_model"]},
    )
    model = MemoryLM(config).to(device).train()
    subject = Subject(build_mixer(layer), dtype=torch.float32, device=str(device))
    streams = subject.streams(1, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(steps):
        half = torch.randint(512, (1, tokens // 2), generator=subject.generator)
        ids = torch.cat([half, half], 1).to(device)  # something to learn: the second half is the first
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(ids, streams=streams).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        is_finite &= torch.isfinite(loss.detach()) & torch.isfinite(norm)
        optimizer.step()
    if not bool(is_finite):
        raise ContractError(f"a loss or gradient of {kind} was not finite within {steps} steps")
    return 0.0


# ---------------------------------------------------------------------------------------------- the run


class Run:
    """Runs checks, keeps their outcome, and writes the record again and again while it goes on."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.timings: list[dict[str, Any]] = []
        self.saved_at = time.perf_counter()
        path = common.record_path(options, NAME)
        if options.resume and path is not None and path.is_file():
            results = read_record(path)["results"]
            self.timings = results["timings"]
            self.outcomes = {item.pop("name"): item for item in results["checks"]}
            print(f"going on after {len(self.outcomes)} checks of {path.name}")

    def do(self, check: Check) -> None:
        """Run one check, unless an earlier run did."""
        if check.name in self.outcomes:
            return
        begin = time.perf_counter()
        outcome: dict[str, Any] = {"status": "passed"}
        try:
            outcome["error"] = check.run()
            common.synchronize(self.device)
        except Exception as error:  # noqa: BLE001 (every failure is an outcome, none ends the run)
            refused = check.may_refuse and isinstance(error, ValueError)
            outcome = {"status": "refused" if refused else "failed", "message": _message(error)}
        outcome["seconds"] = round(time.perf_counter() - begin, 3)
        self.outcomes[check.name] = outcome
        if outcome["status"] == "failed":
            print(f"FAILED {check.name}: {outcome['message']}", flush=True)
            self._leave_dead_device()
        if time.perf_counter() - self.saved_at > SAVE_EVERY_S:
            self.save()

    def count(self, status: str, prefix: str = "") -> int:
        """How many checks under `prefix` ended so."""
        return sum(
            item["status"] == status for name, item in self.outcomes.items() if name.startswith(prefix)
        )

    def save(self) -> None:
        """Write what is known so far."""
        results = {
            "passed": self.count("passed"),
            "failed": self.count("failed"),
            "refused": self.count("refused"),
            "backends": {operation: available_backends(operation) for operation in OPERATIONS},
            "checks": [{"name": name, **outcome} for name, outcome in self.outcomes.items()],
            "timings": self.timings,
        }
        config = {"device": str(self.device), "splits": self.options.splits, "only": self.options.only}
        common.save(self.options, NAME, config, results)
        self.saved_at = time.perf_counter()

    def _leave_dead_device(self) -> None:
        """After an error that leaves CUDA unusable, go on in a fresh process."""
        try:
            common.synchronize(self.device)
        except RuntimeError:
            self.save()
            if common.record_path(self.options, NAME) is None:
                raise
            print("the device is unusable after this error: going on in a fresh process", flush=True)
            arguments = [item for item in sys.argv if item != "--resume"]
            os.execv(sys.executable, [sys.executable, *arguments, "--resume"])


def _message(error: Exception) -> str:
    """The kind of error, its first lines, and where in our code it arose."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ContractError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text} (at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"


def _sample(checks: list[Check], limit: int) -> list[Check]:
    """At most `limit` checks, spread evenly."""
    if len(checks) <= limit:
        return checks
    return [checks[i * len(checks) // limit] for i in range(limit)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks that the command line asks for."""
    parser = common.parser("Check and time kernels, layers and models on a CUDA device.")
    parser.set_defaults(device="cuda")
    parser.add_argument("--only", help="checks whose name contains this, such as kernels/attention")
    parser.add_argument(
        "--splits", type=int, default=10, help="random splits per mixer (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the record at hand has done already")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA device, and torch finds none here. "
            "To try the script itself: python benchmarks/gpu_check.py --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    device = common.prepare(options)
    if options.quick:
        options.splits = min(options.splits, 2)
    run = Run(options, device)
    begin = time.perf_counter()
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")

    timing = [
        Check(f"timing/{task.name}", lambda task=task: run.timings.extend(task.measure()) or 0.0)
        for task in gpu_timing.tasks(device, options.quick)
    ]
    parts = {
        "kernels": list(kernel_checks(device, options.quick)),
        "mixers": list(mixer_checks(device, options.splits)),
        "models": list(model_checks(device)),
        "training": list(training_checks(device, options.quick)),
        "timing": timing,
    }
    for part, checks in parts.items():
        wanted = [check for check in checks if not options.only or options.only in check.name]
        wanted = _sample(wanted, QUICK_CHECKS) if options.quick else wanted
        for group, members in groupby(wanted, key=lambda check: check.name.rsplit("/", 1)[0]):
            started = time.perf_counter()
            for check in members:
                run.do(check)
            if part in ("mixers", "models", "training"):
                print(f"{group}: {time.perf_counter() - started:.1f} s", flush=True)
        print(
            f"{part}: {run.count('passed', part)} passed, {run.count('failed', part)} failed, "
            f"{run.count('refused', part)} not covered by a backend",
            flush=True,
        )
    run.save()
    if run.timings:
        print(gpu_timing.report(run.timings))
    failed = run.count("failed")
    for name, outcome in run.outcomes.items():
        if outcome["status"] == "failed":
            print(f"FAILED {name}: {outcome['message']}")
    if not run.outcomes:
        print(f"no check has {options.only!r} in its name", file=sys.stderr)
        return 2
    print(f"{len(run.outcomes)} checks, {failed} failed, {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
