"""Memory and processor seconds of loading a model, beside transformers reading the same folder.

    python benchmarks/loading.py            models of about 500 MB, and SmolLM2-135M of `make checkpoint`
    python benchmarks/loading.py --quick    a small model, to try the script

Every case is a process of its own, which imports what it needs and reports; its memory is then watched from
outside while it loads. Anonymous memory is what the process itself holds; pages of mapped files are counted
apart, because the system takes them back when it needs room. What loading promises is checked at the end:
beyond the imports it needs at most 1.3 times the bytes of the weights as anonymous memory, a tenth of them
where the weights are mapped as they lie.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch

from memzoo.models.checkpoints.fetch import MEMBER, cache_folder
from memzoo.models.checkpoints.folder import export_llama_folder
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model

NAME = "loading"
BOUND = 1.3  # anonymous memory beyond the imports, over the bytes of the loaded weights
MAPPED_BOUND = 0.1  # the same where weights are mapped
INTERVAL_S = 0.001

# what runs in the process that is watched: imports, "ready", a line to begin, the bytes of the weights
CHILD = """
import sys, time
kind, path, dtype = sys.argv[1:]
import torch
import safetensors.torch
dtype = None if dtype == "stored" else getattr(torch, dtype)
if kind == "memzoo.load":
    import gguf
    import memzoo, memzoo.models.checkpoints.folder
    def load():
        return memzoo.load(path, dtype=dtype)
else:
    import os
    import transformers, memzoo.models.hf
    import accelerate
    from transformers import AutoModelForCausalLM
    transformers.logging.disable_progress_bar()
    def load():
        options = {} if dtype is None else {"dtype": dtype}
        if path.endswith(".gguf"):
            options["gguf_file"] = os.path.basename(path)
            return AutoModelForCausalLM.from_pretrained(os.path.dirname(path), **options)
        return AutoModelForCausalLM.from_pretrained(path, **options)
print("ready", flush=True)
sys.stdin.readline()
begin = time.process_time()
model = load()
seconds = time.process_time() - begin
print(seconds, sum(w.numel() * w.element_size() for w in model.parameters()), flush=True)
sys.stdin.readline()
"""


def watch(kind: str, path: Path, dtype: str = "stored") -> dict[str, Any]:
    """Load in a process of its own; its growth while it loads, in bytes."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, kind, str(path), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"the process that loads {path} ended before it began")
        before = resident(child.pid)
        peak = dict(before)
        child.stdin.write("go\n")
        child.stdin.flush()
        answer: list[str] = []
        output = child.stdout
        reader = threading.Thread(target=lambda: answer.append(output.readline()))
        reader.start()
        while reader.is_alive():
            now = resident(child.pid)
            peak = {name: max(peak[name], now[name]) for name in now}
            time.sleep(INTERVAL_S)
        if not answer[0]:
            raise RuntimeError(f"loading {path} failed")
        seconds, weights = answer[0].split()
        after = resident(child.pid)
    finally:
        child.stdin.close()
        child.wait()
    figures: dict[str, Any] = {"cpu_seconds": float(seconds), "weight_bytes": int(weights)}
    for name in ("anonymous", "mapped"):
        figures[f"peak_{name}_bytes"] = peak[name] - before[name]
        figures[f"held_{name}_bytes"] = after[name] - before[name]
    figures["peak_anonymous_ratio"] = figures["peak_anonymous_bytes"] / figures["weight_bytes"]
    return figures


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process that are in memory: its own, and those of mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {
        ours: int(re.search(rf"^{theirs}:\s*(\d+) kB", status, re.MULTILINE)[1]) << 10  # type: ignore[index]
        for ours, theirs in names.items()
    }


def make_models(folder: Path, quick: bool) -> dict[str, Path]:
    """Folders of random models: plain attention, written by both of our writers, and a hybrid."""
    torch.manual_seed(0)
    sizes = (8000, 512, 4) if quick else (32_000, 768, 12)
    vocab_size, d_model, num_layers = sizes
    attention = {"type": "attention", "num_heads": d_model // 64}
    window = attention | {"type": "sliding_window", "window_size": 64}
    hybrid = [attention | {"type": "based"}, window]

    def model(pattern: Sequence[dict[str, Any]]) -> MemoryLM:
        layers = {"pattern": list(pattern), "repeat": num_layers // len(pattern)}
        mlp = {"type": "swiglu", "d_ff": 8 * d_model // 3}
        return MemoryLM(ModelConfig(vocab_size=vocab_size, d_model=d_model, layers=layers, mlp=mlp))

    plain = model([attention])
    save_model(plain, folder / "memzoo folder")
    export_llama_folder(plain, folder / "Llama folder")
    save_model(model(hybrid), folder / "memzoo hybrid")
    return {path.name: path for path in sorted(folder.iterdir())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case, print the table, write the record; 1 when a bound is broken."""
    options = common.parser(__doc__.split("\n")[0]).parse_args(arguments)
    common.prepare(options)
    with tempfile.TemporaryDirectory(prefix="memzoo-loading-") as temporary:
        places = make_models(Path(temporary), options.quick)
        cases = [
            ("memzoo.load", "memzoo folder", "stored"),
            ("memzoo.load", "memzoo folder", "bfloat16"),
            ("from_pretrained", "memzoo folder", "stored"),
        ]
        smollm2 = cache_folder() / Path(MEMBER).name
        if not options.quick:
            cases += [
                ("from_pretrained", "memzoo folder", "bfloat16"),
                ("memzoo.load", "memzoo hybrid", "stored"),
                ("from_pretrained", "memzoo hybrid", "stored"),
                ("memzoo.load", "Llama folder", "stored"),
                ("from_pretrained", "Llama folder", "stored"),
                ("memzoo.load", "Llama folder", "bfloat16"),
                ("from_pretrained", "Llama folder", "bfloat16"),
            ]
            if smollm2.is_file():
                places["SmolLM2 GGUF"] = smollm2
                cases += [
                    (kind, "SmolLM2 GGUF", dtype)
                    for dtype in ("float32", "bfloat16")
                    for kind in ("memzoo.load", "from_pretrained")
                ]
        rows = []
        for kind, place, dtype in cases:
            figures = watch(kind, places[place], dtype)
            rows.append({"reader": kind, "source": place, "dtype": dtype, **figures})
    checked = bounds(rows)
    header = ("reader", "source", "dtype", "CPU s", "weights MB", "anonymous MB", "ratio", "mapped MB")
    cells = [
        (
            row["reader"], row["source"], row["dtype"], row["cpu_seconds"], row["weight_bytes"] / 1e6,
            row["peak_anonymous_bytes"] / 1e6, row["peak_anonymous_ratio"], row["peak_mapped_bytes"] / 1e6,
        )
        for row in rows
    ]  # fmt: skip
    print(common.table(cells, header))
    for bound in checked:
        if not bound["passed"]:
            print(f"broken: {json.dumps(bound)}")
    config = {"quick": options.quick, "interval_s": INTERVAL_S}
    common.save(options, NAME, config, {"rows": rows, "bounds": checked})
    return 0 if all(bound["passed"] for bound in checked) else 1


def bounds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What loading by this library promises, and whether it was kept; transformers alone is not judged."""
    found = []
    for row in rows:
        if row["reader"] == "from_pretrained" and not row["source"].startswith("memzoo"):
            continue
        bound = MAPPED_BOUND if row["dtype"] == "stored" else BOUND
        ratio = row["peak_anonymous_ratio"]
        name = f"{row['reader']}, {row['source']}, {row['dtype']}"
        found.append({"bound": name, "limit": bound, "value": ratio, "passed": ratio <= bound})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
