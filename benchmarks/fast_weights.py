"""Memories whose weights learn while they read: speed by chunk, time of a token, memory of training.

    python benchmarks/fast_weights.py
    python benchmarks/fast_weights.py --only speed --peers folder/of/titans-pytorch

*speed*: tokens per second of forward and backward at chunks of 16 to 1,024 tokens, beside `NeuralMemory` of
titans-pytorch with the same width, heads, net and chunk where that package can be imported (it is no
dependency; `--peers` adds a folder to the import path). *decode*: time of one step after 1,024 and after
65,536 tokens. *memory*: bytes of all tensors alive at most in a training step, against the number of chunks,
with and without running them again in the backward pass.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import nn
from training_memory import LiveBytes

from memzoo.layers import TokenMixer, build_mixer

# Dimensions: B batch, T tokens, M model width

CHUNKS = (16, 64, 256, 1024)
PEER = "titans-pytorch"
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is read.

    Attributes:
        width, heads: of every layer; heads of the memories.
        tokens, batch: of the timing of speed.
        past: tokens read before the steps that are timed.
        chunks_of_memory, memory_chunk: how many chunks of what size a training step reads.
    """

    width: int = 256
    heads: int = 4
    tokens: int = 4096
    batch: int = 1
    past: tuple[int, int] = (1024, 65_536)
    chunks_of_memory: tuple[int, ...] = (4, 16, 64, 256)
    memory_chunk: int = 64
    chunks: tuple[int, ...] = CHUNKS


QUICK = Sizes(
    width=16,
    heads=2,
    tokens=96,
    past=(8, 40),
    chunks_of_memory=(2, 8),
    memory_chunk=8,
    chunks=(8, 32),
)


def memories(sizes: Sizes, chunk: int) -> dict[str, dict[str, Any]]:
    """Our mixers by name, of one width, with chunks of one size."""
    own = {"d_model": sizes.width, "num_heads": sizes.heads}
    net = {**own, "chunk_size": chunk}
    return {
        "fast_weight_memory": {"type": "fast_weight_memory", **net, "mem_dim": sizes.width},
        "titans": {"type": "titans", **net},
        "titans, gates per token": {"type": "titans", **net, "gates": "token", "qk_norm": "l2"},
        "memory_as_context": {
            "type": "memory_as_context",
            **own,
            "mixers": [{"type": "titans", "num_heads": sizes.heads, "chunk_size": chunk}],
        },
    }


def peer(sizes: Sizes, chunk: int) -> nn.Module | None:
    """`NeuralMemory` with the sizes of our `titans`; None where the package is missing."""
    try:
        from titans_pytorch import MemoryMLP, NeuralMemory
    except ImportError:
        return None
    width = sizes.width // sizes.heads
    memory: nn.Module = NeuralMemory(
        dim=sizes.width,
        chunk_size=chunk,
        heads=sizes.heads,
        dim_head=width,
        model=MemoryMLP(width, depth=2, expansion_factor=4.0),
        use_accelerated_scan=False,
    )
    return memory


def speed(sizes: Sizes, device: torch.device, budget_s: float) -> list[dict[str, Any]]:
    """Forward and backward of every memory at every chunk, in turns."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.width, device=device)
    found = []
    for chunk in sizes.chunks:
        layers: dict[str, Forward] = {}
        for name, config in memories(sizes, chunk).items():
            mixer = build_mixer(config).to(device)
            layers[name] = lambda given, mixer=mixer: mixer(given).hidden  # type: ignore[misc]
        other = peer(sizes, chunk)
        if other is not None:
            module = other.to(device)
            layers[PEER] = lambda given, module=module: module(given)[0]  # type: ignore[misc]
        runs = {name: _training_step(layer, x) for name, layer in layers.items()}
        times = common.time_interleaved(
            runs, device=device, budget_s=budget_s, max_repeats=9, min_repeats=3, warmup=1
        )
        for name, taken in times.items():
            rate = sizes.batch * sizes.tokens / (1e-3 * taken["median_ms"])
            found.append({"memory": name, "chunk": chunk, "tokens_per_s": rate, **taken})
            print(f"chunk {chunk:5d}  {name:26s} {rate:10.0f} tokens/s", flush=True)
    return found


def _training_step(layer: Forward, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        leaf = x.detach().requires_grad_()
        layer(leaf).square().sum().backward()

    return run


def decode(sizes: Sizes, device: torch.device, budget_s: float) -> list[dict[str, Any]]:
    """Time of a step that closes no chunk, after few and after many tokens, in turns."""
    chunk = max(sizes.chunks)
    steps: dict[str, Callable[[], object]] = {}
    for name, config in memories(sizes, chunk).items():
        mixer = build_mixer(config).to(device)
        for past in sizes.past:
            steps[f"{name}, {past}"] = _step(mixer, past, sizes.width, device)
    with torch.no_grad():
        times = common.time_interleaved(
            steps, device=device, budget_s=budget_s, max_repeats=200, min_repeats=20, warmup=3
        )
    found = []
    for label, taken in times.items():
        name, past = label.rsplit(", ", 1)
        found.append({"memory": name, "past": int(past), **taken})
        print(f"after {past:>6}  {name:26s} {taken['median_ms']:8.3f} ms", flush=True)
    return found


def _step(mixer: TokenMixer, past: int, width: int, device: torch.device) -> Callable[[], object]:
    with torch.no_grad():
        state, piece = None, 4096
        for start in range(0, past, piece):
            x = torch.randn(1, min(piece, past - start), width, device=device)
            state = mixer(x, state, return_state=True).state
    token = torch.randn(1, width, device=device)
    return lambda: mixer.step(token, state)


def memory(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Bytes of all tensors alive at most in forward and backward, beside those of the layer itself."""
    found = []
    for again in (True, False):
        config = memories(sizes, sizes.memory_chunk)["fast_weight_memory"]
        mixer = build_mixer({**config, "recompute": again}).to(device)
        for count in sizes.chunks_of_memory:
            gc.collect()
            counter = LiveBytes()
            with counter:
                x = torch.randn(1, count * sizes.memory_chunk, sizes.width, device=device)
                mixer(x.requires_grad_()).hidden.square().sum().backward()
            mixer.zero_grad(set_to_none=True)
            found.append({"chunks": count, "recompute": again, "tensor_bytes": counter.peak})
            print(f"{count:5d} chunks  recompute {again!s:5}  {counter.peak / 1e6:9.1f} MB", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for and write the record."""
    parts = ("speed", "decode", "memory")
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to run")
    parser.add_argument("--peers", help="folder in front of the import path, with titans-pytorch")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per timed function")
    options = parser.parse_args(arguments)
    if options.peers:
        sys.path.insert(0, options.peers)
    device = common.prepare(options)
    torch.manual_seed(0)
    sizes = QUICK if options.quick else Sizes()
    budget = 0.05 if options.quick else options.budget
    results: dict[str, Any] = {}
    if "speed" in options.only:
        results["speed"] = speed(sizes, device, budget)
        results["peer"] = _version(PEER)
    if "decode" in options.only:
        results["decode"] = decode(sizes, device, budget)
    if "memory" in options.only:
        results["memory"] = memory(sizes, device)
    common.save(options, "fast_weights", {"sizes": vars(sizes), "budget_s": budget}, results)
    return 0


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
