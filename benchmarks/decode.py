"""Milliseconds per decoded token of whole models after contexts of growing length, hybrids beside attention.

    python benchmarks/decode.py                 small models, and SmolLM2-135M where `make checkpoint` left it
    python benchmarks/decode.py --skip-real     small models alone
    python benchmarks/decode.py --quick         to try the script

Each model reads a text once, up to each context, and keeps the state there. Then, in turns over all models
and contexts, the next tokens are decoded from copies of these states, first with `MemoryLM.step`, then with
`generate()` of transformers on a cache that holds the context. What a state of constant size promises is
checked at the end: its bytes differ by at most 2 % between contexts, a token at 4,096 costs at most 1.5 times
one at 256, and no call reads the context again (the tokens that pass the embedding are counted).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import common
import torch
from torch import Tensor

from memzoo.models.checkpoints.fetch import MEMBER, cache_folder
from memzoo.models.checkpoints.folder import load_model
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import ConversionPlan, convert_mixers
from memzoo.models.decoder import MemoryLM, ModelState

NAME = "decode"
TIME_BOUND = 1.5  # longest of the contexts below against the shortest
SIZE_BOUND = 1.02
PIECE = 1024  # tokens of one call while a context is read


@dataclass(frozen=True)
class Sizes:
    """What a run measures.

    Attributes:
        contexts: tokens in front of the decoded ones, for every model.
        long_contexts: further ones for models whose state does not grow.
        steps: tokens decoded in a timed run.
        budget_s: seconds per model and context.
        d_model: width of the small models; heads are 64 wide, or 8 in a quick run.
    """

    contexts: tuple[int, ...] = (256, 1024, 4096)
    long_contexts: tuple[int, ...] = (65536,)
    steps: int = 8
    budget_s: float = 4.0
    d_model: int = 256
    head_dim: int = 64
    window_size: int = 64
    vocab_size: int = 4096


QUICK = Sizes(
    contexts=(32, 96),
    long_contexts=(160,),
    steps=4,
    budget_s=0.05,
    d_model=32,
    head_dim=8,
    window_size=8,
    vocab_size=64,
)


@dataclass
class Subject:
    """A model under test, and its states after each context."""

    name: str
    model: MemoryLM
    contexts: tuple[int, ...]
    is_constant: bool
    states: dict[int, ModelState] = field(default_factory=dict)
    ids: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def make(cls, name: str, model: MemoryLM, sizes: Sizes) -> Subject:
        """Find out whether the state grows, and which contexts follow from that."""
        far = max(sizes.contexts + sizes.long_contexts)
        is_constant = model.state_num_bytes(far) == model.state_num_bytes(min(sizes.contexts))
        contexts = sizes.contexts + (sizes.long_contexts if is_constant else ())
        return cls(name, model.eval(), contexts, is_constant)

    def read(self, steps: int) -> None:
        """Read up to `steps` tokens before each context, so that the timed tokens end at it."""
        device = self.model.embed_tokens.weight.device
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (1, max(self.contexts)), generator=generator).to(device)
        state, seen = None, 0
        for context in sorted(self.contexts):
            while seen < context - steps:
                piece = self.ids[:, seen : min(seen + PIECE, context - steps)]
                state = self.model(piece, state, return_state=True, last_only=True).state
                seen += piece.shape[1]
            assert state is not None
            self.states[context] = state


def small_models(sizes: Sizes, device: torch.device) -> dict[str, MemoryLM]:
    """Four blocks each, alike but for their mixers."""
    window = {"type": "sliding_window", "window_size": sizes.window_size, "num_sinks": 4}
    lolcats = {"type": "lolcats", "window_size": sizes.window_size, "num_sinks": 4}
    attention = {"type": "attention"}
    plans: dict[str, list[Mapping[str, Any]]] = {
        "attention": [attention] * 4,
        "window + sinks": [window] * 4,
        "linear attention": [{"type": "linear_attention"}] * 4,
        "based hybrid": [{"type": "base_conv"}, {"type": "based"}, window, {"type": "based"}],
        "lolcats": [lolcats] * 4,
        "lolcats, every fourth attention": [lolcats, lolcats, lolcats, attention],
    }
    models = {}
    for name, layers in plans.items():
        torch.manual_seed(0)
        heads = {"num_heads": sizes.d_model // sizes.head_dim, "head_dim": sizes.head_dim}
        config = ModelConfig(
            vocab_size=sizes.vocab_size,
            d_model=sizes.d_model,
            layers=layers,
            mixer_defaults=heads,
            mlp={"type": "swiglu", "d_ff": 3 * sizes.d_model},
        )
        models[f"small {name}"] = MemoryLM(config).to(device)
    return models


def real_models(device: torch.device) -> dict[str, MemoryLM]:
    """SmolLM2-135M in bfloat16 and hybrids made of it; none where the file is not in the cache."""
    path = cache_folder() / MEMBER.rsplit("/", 1)[-1]
    if not path.is_file():
        print(f"no {path.name} in the cache (`make checkpoint` brings it): the real model is left out")
        return {}
    source = load_model(path, dtype=torch.bfloat16, device=device)
    window = {"type": "sliding_window", "window_size": 64, "num_sinks": 4}
    lolcats = {"type": "lolcats", "window_size": 64, "num_sinks": 4}
    three_of_four = [index for index in range(source.config.depth) if index % 4 != 3]
    plans = {
        "SmolLM2 window + sinks": ConversionPlan(target=window),
        "SmolLM2 lolcats": ConversionPlan(target=lolcats),
        "SmolLM2 lolcats, every fourth attention": ConversionPlan(target=lolcats, layers=three_of_four),
    }
    made = {name: convert_mixers(source, plan)[0] for name, plan in plans.items()}
    return {"SmolLM2 attention": source, **made}


@contextmanager
def counted_tokens(model: MemoryLM) -> Iterator[list[int]]:
    """A list of one number: the tokens that the model has read inside the block."""
    count = [0]

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        count[0] += inputs[0].numel()

    handle = model.embed_tokens.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def time_steps(
    subjects: Sequence[Subject], sizes: Sizes, device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """Rows of `MemoryLM.step`, and the tokens read in excess of those decoded."""
    functions, before, holders = {}, {}, {}
    for subject in subjects:
        for context in subject.contexts:
            key = f"{subject.name}\n{context}"
            holder: dict[str, ModelState] = {}

            def copy(holder=holder, state=subject.states[context]) -> None:
                holder["state"] = state.clone()

            def decode(holder=holder, subject=subject, context=context) -> None:
                for token in subject.ids[:, context - sizes.steps : context].unbind(1):
                    holder["state"] = subject.model.step(token, holder["state"], donate=True).state

            functions[key], before[key], holders[key] = decode, copy, (subject, context, holder)
    excess = 0
    for key, (subject, _, _) in holders.items():
        before[key]()
        with counted_tokens(subject.model) as count:
            functions[key]()
        excess += count[0] - sizes.steps
    times = common.time_interleaved(
        functions, device=device, before=before, budget_s=sizes.budget_s, wall_clock=True
    )
    rows = []
    for key, taken in times.items():
        subject, context, holder = holders[key]
        rows.append(
            {
                "model": subject.name,
                "context": context,
                "is_constant": subject.is_constant,
                "ms_per_token": taken["median_ms"] / sizes.steps,
                "p10_ms": taken["p10_ms"] / sizes.steps,
                "p90_ms": taken["p90_ms"] / sizes.steps,
                "repeats": taken["repeats"],
                "state_bytes": holder["state"].num_bytes(),
                "declared_bytes": subject.model.state_num_bytes(
                    context, 1, subject.model.embed_tokens.weight.dtype
                ),
            }
        )
    return rows, excess


def time_generate(
    subjects: Sequence[Subject], sizes: Sizes, device: torch.device, rounds: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows of transformers' `generate` on a cache that holds the context, and the tokens read in excess."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    from memzoo.models.hf import MemoryCache, MemoryForCausalLM

    class Clock(StoppingCriteria):
        """Notes when each token is there; never stops."""

        def __init__(self) -> None:
            self.moments: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            common.synchronize(device)
            self.moments.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    samples: dict[tuple[str, int], list[float]] = {}
    excess = 0
    wrapped = {subject.name: MemoryForCausalLM.from_model(subject.model) for subject in subjects}
    for round_index in range(rounds + 1):  # the first round warms up
        for subject in subjects:
            for context in subject.contexts:
                clock = Clock()
                with counted_tokens(subject.model) as count:
                    wrapped[subject.name].generate(
                        subject.ids[:, : context - sizes.steps + 1],
                        past_key_values=MemoryCache(subject.states[context]),
                        max_new_tokens=sizes.steps,
                        do_sample=False,
                        stopping_criteria=StoppingCriteriaList([clock]),
                    )
                excess += count[0] - sizes.steps
                gaps = [1e3 * (b - a) for a, b in zip(clock.moments, clock.moments[1:], strict=False)]
                if round_index:
                    samples.setdefault((subject.name, context), []).extend(gaps)
    rows = []
    for (name, context), gaps in samples.items():
        taken = common.summarize(gaps)
        rows.append({"model": name, "context": context, "ms_per_token": taken.pop("median_ms"), **taken})
    return rows, excess


def bounds(
    rows: Sequence[Mapping[str, Any]],
    generated: Sequence[Mapping[str, Any]],
    contexts: tuple[int, ...],
    excess: Mapping[str, int],
) -> list[dict[str, Any]]:
    """What constant-state models promise, each with the value found."""
    found: list[dict[str, Any]] = []

    def add(kind: str, model: str, value: float, bound: float) -> None:
        found.append(
            {"bound": kind, "model": model, "value": value, "at_most": bound, "passed": value <= bound}
        )

    for model in dict.fromkeys(row["model"] for row in rows if row["is_constant"]):
        sizes = [row["state_bytes"] for row in rows if row["model"] == model]
        add("state bytes, largest / smallest context", model, max(sizes) / min(sizes), SIZE_BOUND)
        for kind, timed in (("step", rows), ("generate", generated)):
            ms = {row["context"]: row["ms_per_token"] for row in timed if row["model"] == model}
            if ms:
                ratio = ms[max(contexts)] / ms[min(contexts)]
                add(f"ms per token of {kind}, {max(contexts)} / {min(contexts)}", model, ratio, TIME_BOUND)
    for row in rows:
        off = abs(row["state_bytes"] - row["declared_bytes"])
        if off:
            add(f"state bytes besides those declared, {row['context']}", row["model"], off, 0)
    for kind, tokens in excess.items():
        add(f"tokens read again by {kind}", "all", tokens, 0)
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the record; 1 when a promise was not kept."""
    parser = common.parser("Time decoding of whole models after contexts of growing length.")
    parser.add_argument("--skip-real", action="store_true", help="leave SmolLM2-135M out")
    options = parser.parse_args(arguments)
    device = common.prepare(options)
    sizes = QUICK if options.quick else Sizes()
    models = small_models(sizes, device)
    if not options.quick and not options.skip_real:
        models |= real_models(device)
    subjects = [Subject.make(name, model, sizes) for name, model in models.items()]
    for subject in subjects:
        begin = time.perf_counter()
        subject.read(sizes.steps)
        print(
            f"{subject.name}: read {max(subject.contexts)} tokens in {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    rows, step_excess = time_steps(subjects, sizes, device)
    generated, generate_excess = time_generate(subjects, sizes, device, rounds=1 if options.quick else 3)
    checked = bounds(rows, generated, sizes.contexts, {"step": step_excess, "generate": generate_excess})
    by_key = {(row["model"], row["context"]): row["ms_per_token"] for row in generated}
    print(
        common.table(
            [
                (
                    row["model"],
                    row["context"],
                    float(row["ms_per_token"]),
                    float(by_key[row["model"], row["context"]]),
                    row["state_bytes"],
                )
                for row in rows
            ],
            ("model", "context", "step ms", "generate ms", "state bytes"),
        )
    )
    config = {
        "contexts": sizes.contexts,
        "long_contexts": sizes.long_contexts,
        "steps": sizes.steps,
        "device": str(device),
        "models": {
            subject.name: {
                "dtype": str(subject.model.embed_tokens.weight.dtype).removeprefix("torch."),
                "parameters": subject.model.num_parameters(),
                "config": subject.model.config.to_dict(),
            }
            for subject in subjects
        },
    }
    common.save(options, NAME, config, {"step": rows, "generate": generated, "bounds": checked})
    # times of a quick run say nothing
    broken = [
        item for item in checked if not item["passed"] and not (options.quick and "ms per" in item["bound"])
    ]
    for item in broken:
        found = f"{item['bound']} is {item['value']:.3g}, allowed {item['at_most']:g}"
        print(f"NOT KEPT by {item['model']}: {found}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
