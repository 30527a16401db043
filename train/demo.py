"""The demonstration: a real pretrained language model becomes a memory hybrid, with every figure measured on
the way.

    make demo            (or: python -m memzoo.train.demo --output demo_output)

Writes `index.html` with the table and the plots, `record.json` with every number, and `hybrid/`, a folder
that `AutoModelForCausalLM` loads. Needs about nine minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoints.fetch import fetch_smollm2
from ..models.checkpoints.folder import load_model, read_model_config
from ..models.decoder import MemoryLM
from ..models.hf import save_model
from ..records import results_folder, write_record, write_text_atomically
from .conversion.comparison import CAPTION, comparison_results, comparison_table
from .conversion.folder import finish, start_anew
from .conversion.page import comparison_sections
from .conversion.recipe import check_recipe, read_recipe, recipe_dict
from .conversion.run import Comparison, book_tokens, convert_and_compare, training_results
from .data.tokenizers import load_tokenizer
from .report_page import Section, render_page

logger = logging.getLogger(__name__)

BOOKS = ("moby_dick", "emma")
_NOTE = (
    "SmolLM2-135M-Instruct, every attention layer replaced by a window with sinks and a linear-attention "
    "memory. The control is a window with the same sinks, tuned on the same tokens in the same order with "
    "the same number of trainable parameters, but without a memory. All numbers with the command that made "
    "them are in record.json beside this page."
)


def run_demo(output: str = "demo_output", recipe: str = "demo", num_windows: int = 8) -> str:
    """Parity, conversion, control, comparison, page.

    Args:
        output: folder for the results.
        recipe: name of a shipped recipe or a YAML file.
        num_windows: windows of 1,024 tokens of each of two books.

    Returns:
        the table.
    """
    clock = time.monotonic()
    folder = results_folder(output)
    # of a demonstration that was cut short: this one is timed from its beginning
    start_anew(folder)
    seconds: dict[str, float] = {}
    chosen = read_recipe(recipe)
    checkpoint = str(fetch_smollm2())
    check_recipe(chosen, read_model_config(checkpoint))
    teacher = load_model(checkpoint).eval()
    tokenizer = load_tokenizer(checkpoint)
    tokens = {book: book_tokens(tokenizer, book) for book in BOOKS}

    with _phase("1/4 parity: the same file through this library and through transformers", seconds):
        parity = parity_with_transformers(teacher, checkpoint, tokens["moby_dick"][:256])
        _say(
            f"    largest difference of the logits {parity['max_error']:.2g}, same top token at "
            f"{parity['same_top']:.2%}"
        )

    with _phase("2/4 conversion of all layers, short tune, and the control with the same budget", seconds):
        rows, conversions = convert_and_compare(
            teacher,
            checkpoint,
            chosen,
            folder,
            tokens=tokens,
            comparison=Comparison(num_windows=num_windows),
        )
        hybrid = conversions["hybrid"]
        save_model(hybrid.model.to(torch.bfloat16), folder / "hybrid", tokenizer=tokenizer)

    with _phase("3/4 speed of decoding", seconds):
        speed = {
            "teacher, full attention": decode_speed(teacher, tokens["moby_dick"]),
            "hybrid": decode_speed(hybrid.model, tokens["moby_dick"]),
        }
    with _phase("4/4 a continuation by the saved folder, loaded with AutoModelForCausalLM", seconds):
        prompt = tokenizer.decode(tokens["moby_dick"][20_000:20_300])
        continuation = generate_from_folder(folder / "hybrid", prompt)

    table = comparison_table(rows)
    sections = comparison_sections(rows, conversions) + _sections(parity, speed, prompt, continuation)
    page = render_page("A pretrained model becomes a memory hybrid", sections, note=_NOTE)
    write_text_atomically(folder / "index.html", page)
    results = comparison_results(rows) | training_results(conversions)
    results |= {
        "parity": parity,
        "surgery": hybrid.report.to_dict(),
        "decode_tokens_per_second": speed,
        "continuation": {"prompt_end": prompt[-200:], "text": continuation},
        "phase_seconds": seconds,
        "total_seconds": time.monotonic() - clock,
    }
    finish(folder)
    write_record(folder / "record.json", name="demo", config=recipe_dict(chosen), results=results)
    return f"{CAPTION}\n\n{table}\n\nwritten to {folder}/: index.html, record.json, hybrid/"


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announces a part of the demonstration and keeps its duration."""
    _say(name)
    clock = time.monotonic()
    yield
    seconds[name] = time.monotonic() - clock


def parity_with_transformers(model: MemoryLM, checkpoint: str, ids: Tensor) -> dict[str, float]:
    """Logits of this library beside those of transformers' own reading of the same GGUF file, both
    float32.
    """
    from transformers import AutoModelForCausalLM

    path = Path(checkpoint)
    other = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = model(ids[None]).logits[0], other.eval()(ids[None]).logits[0]
    return {
        "num_tokens": float(len(ids)),
        "max_error": float((ours - theirs).abs().max()),
        "same_top": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def decode_speed(
    model: MemoryLM, tokens: Tensor, contexts: Sequence[int] = (256, 4096), num_tokens: int = 24
) -> dict[str, float]:
    """Tokens per second of decoding after each context, bfloat16, batch 1; the median step counts."""
    low = model.to(torch.bfloat16).eval()
    found = {}
    for context in contexts:
        state: Any = None
        for start in range(0, context, 1024):
            part = tokens[None, start : min(start + 1024, context)]
            state = low(part, state, return_state=True, last_only=True).state
        seconds = []
        for index in range(num_tokens):
            clock = time.perf_counter()
            state = low.step(tokens[context + index][None], state, donate=True).state
            seconds.append(time.perf_counter() - clock)
        found[str(context)] = 1 / sorted(seconds)[num_tokens // 2]
    return found


def generate_from_folder(folder: Path, prompt: str, max_new_tokens: int = 48) -> str:
    """Greedy continuation by a saved folder, loaded the way any Hugging Face user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _sections(
    parity: dict[str, float], speed: dict[str, dict[str, float]], prompt: str, continuation: str
) -> list[Section]:
    """What the page says beside the comparison."""
    agreement = (
        "Read through this library and through transformers, the same file gives logits that differ by at "
        f"most {parity['max_error']:.2g} over {int(parity['num_tokens'])} tokens; the top token agrees at "
        f"{parity['same_top']:.2%}."
    )
    contexts = list(next(iter(speed.values())))
    rows = [["tokens per second", *(f"after {int(context):,} tokens" for context in contexts)]]
    rows += [[name, *(f"{rates[context]:.1f}" for context in contexts)] for name, rates in speed.items()]
    return [
        Section("Parity", text=agreement),
        Section("Decoding", table=rows),
        Section("A continuation", lines=f"... {prompt[-300:]}[{continuation}]"),
    ]


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Command line of the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo_output", help="folder for the results")
    parser.add_argument("--recipe", default="demo", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--num_windows", type=int, default=8, help="windows of 1,024 tokens of each book")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="    %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    table = run_demo(arguments.output, arguments.recipe, arguments.num_windows)
    sys.stdout.write("\n" + table + "\n")


if __name__ == "__main__":
    main()
