"""Peak memory of one training step on a long sequence: losses with and without all logits, recomputation.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --tokens 2048 --only llama

One step is forward, backward and AdamW in float32 on a batch of one sequence, by a model with the sizes of
SmolLM2-135M and fewer blocks. Every case runs in a process of its own, whose largest resident set is the
figure. For lengths up to 2,048 a second run counts the bytes of all tensors, which leaves out Python,
libraries and what the allocator keeps. A case that needs more
than the limit is stopped and said to. The same chunked loss is given to a Llama of transformers, fed with
its hidden states.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memzoo.kernels import linear_cross_entropy
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM

MIXERS: dict[str, dict[str, Any]] = {
    "full attention": {"type": "attention"},
    "window of 512": {"type": "sliding_window", "window_size": 512},
}
LLAMA = "transformers Llama"
COUNTED_TOKENS = 2048
OVER_LIMIT = 3  # exit status of a case that did not fit

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step.

    Attributes:
        model: a name of `MIXERS`, or `LLAMA`.
        tokens: length of the sequence.
        chunked: the loss from hidden states; otherwise logits of all positions.
        recompute: run every block again in the backward pass.
        layers: number of blocks.
        d_model, vocab_size: sizes; heads are 64 wide, three share their keys and values.
    """

    model: str
    tokens: int
    chunked: bool
    recompute: bool
    layers: int
    d_model: int = 576
    vocab_size: int = 49_152

    @property
    def d_ff(self) -> int:
        return 8 * self.d_model // 3

    @property
    def num_heads(self) -> int:
        return self.d_model // 64

    @property
    def name(self) -> str:
        loss = "chunked loss" if self.chunked else "all logits"
        return f"{self.model}, {loss}{', recomputed' if self.recompute else ''}, {self.tokens} tokens"


def build(case: Case) -> tuple[nn.Module, Loss]:
    """The model, and the loss of ids and labels (1, T)."""
    if case.model == LLAMA:
        return _llama(case)
    config = ModelConfig(
        vocab_size=case.vocab_size,
        d_model=case.d_model,
        layers={**MIXERS[case.model], "num_heads": case.num_heads, "num_kv_heads": case.num_heads // 3},
        num_layers=case.layers,
        mlp={"type": "swiglu", "d_ff": case.d_ff},
        tie_embeddings=True,
    )
    model = MemoryLM(config).train()
    model.gradient_checkpointing = case.recompute

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        if not case.chunked:
            return F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        out = model(ids, return_hidden_states="last", last_only=True)
        return linear_cross_entropy(out.hidden_states[0].flatten(0, 1), model.head_weight, labels.flatten())

    return model, loss


def _llama(case: Case) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.d_model,
        intermediate_size=case.d_ff,
        num_hidden_layers=case.layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_heads // 3,
        max_position_embeddings=case.tokens,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    if case.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        if case.chunked:
            return linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten())
        return F.cross_entropy(model.lm_head(hidden), labels.flatten())

    return model, loss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def run_case(case: Case, limit_gib: float, count: bool) -> dict[str, Any]:
    """One step in this process, which is not to be used further."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out after all, this process goes
    limit = int(limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    counter = LiveBytes()
    with counter if count else nullcontext():
        model, loss = build(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(case.vocab_size, (1, case.tokens + 1))
        before = largest_resident_set()
        begin = time.process_time()
        value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        optimizer.step()
        cpu_seconds = time.process_time() - begin
    if count:
        return {"tensor_bytes": counter.peak}
    return {
        "loss": value.item(),
        "peak_bytes": largest_resident_set(),
        "before_bytes": before,
        "cpu_seconds": cpu_seconds,
    }


def largest_resident_set() -> int:
    """Bytes that this process has had at most (Linux).

    Not from `getrusage`, whose figure begins with that of the process that started this one.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def measure(case: Case, limit_gib: float, threads: int, count: bool) -> dict[str, Any]:
    """The case in a fresh process; `fits` says whether it stayed below the limit."""
    given = json.dumps({"case": asdict(case), "limit_gib": limit_gib, "threads": threads, "count": count})
    done = subprocess.run(
        [sys.executable, __file__, "--case", given], capture_output=True, text=True, check=False
    )
    if done.returncode == OVER_LIMIT:
        return {**asdict(case), "fits": False}
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr}")
    return {**asdict(case), "fits": True, **json.loads(done.stdout)}


def _child(text: str) -> int:
    given = json.loads(text)
    torch.set_num_threads(given["threads"])
    try:
        result = run_case(Case(**given["case"]), given["limit_gib"], given["count"])
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return OVER_LIMIT
        raise
    print(json.dumps(result))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record after every case."""
    options_of = common.parser("Peak memory of a training step.")
    options_of.add_argument(
        "--tokens", type=int, action="append", help="length (may be repeated; default: 2048, 16384)"
    )
    options_of.add_argument("--layers", type=int, default=4, help="blocks (default: %(default)s)")
    options_of.add_argument(
        "--limit_gib", type=float, default=18.0, help="of a process (default: %(default)s)"
    )
    options_of.add_argument("--only", help="models whose name holds this")
    options_of.add_argument("--case", help="for the processes that this script starts")
    options = options_of.parse_args(arguments)
    if options.case is not None:
        return _child(options.case)
    common.prepare(options)
    lengths = options.tokens or ([64] if options.quick else [2048, 16_384])
    sizes: dict[str, int] = {"layers": options.layers}
    if options.quick:
        sizes = {"layers": 1, "d_model": 192, "vocab_size": 4096}
    cases = [
        Case(model=model, tokens=tokens, chunked=chunked, recompute=recompute, **sizes)
        for tokens in lengths
        for model in (*MIXERS, LLAMA)
        if not options.only or options.only.lower() in model.lower()
        for recompute in ((True,) if options.quick else (False, True))
        for chunked in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    for case in cases:
        threads = torch.get_num_threads()
        row = measure(case, options.limit_gib, threads, count=False)
        if row["fits"] and not options.quick and case.tokens <= COUNTED_TOKENS:
            row |= measure(case, options.limit_gib, threads, count=True)
        rows.append(row)
        shown = f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["fits"] else f"over {options.limit_gib} GiB"
        print(f"{case.name}: {shown}", flush=True)
        config = {
            "limit_gib": options.limit_gib,
            "threads": threads,
            "is_complete": case is cases[-1],
        }
        common.save(options, "training_memory", config, {"cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
