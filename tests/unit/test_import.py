"""`import memzoo.layers` stays light: compared with `import torch` in the same process."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import memzoo.layers
end = time.perf_counter()
heavy = [name for name in ("lightning", "transformers", "datasets", "peft") if name in sys.modules]
print(json.dumps({"torch": middle - start, "layers": end - middle, "heavy": heavy}))
"""


def _import_layers() -> dict:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_importing_layers_adds_little_to_torch():
    found = min((_import_layers() for _ in range(3)), key=lambda item: item["layers"])
    # torch takes about two seconds on an idle machine of ours; a busy one slows both imports alike
    assert found["layers"] < max(2.0, found["torch"]), found


def test_importing_layers_loads_nothing_heavy():
    assert _import_layers()["heavy"] == []
