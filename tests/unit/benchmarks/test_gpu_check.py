"""The GPU check, run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memzoo.kernels.backend import OPERATIONS
from memzoo.records import read_record

ROOT = Path(__file__).resolve().parents[3]
# what a GPU machine need not have
ABSENT = ("accelerate", "datasets", "gguf", "jsonargparse", "lightning", "peft", "tokenizers", "transformers")


def run_script(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run gpu_check.py of the tree at `root` where the heavy packages cannot be imported."""
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, 'benchmarks'); "
        f"sys.argv[:] = ['benchmarks/gpu_check.py', *{list(arguments)!r}]; "
        "runpy.run_path('benchmarks/gpu_check.py', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert "needs a CUDA device" in printed.err


@pytest.mark.slow
def test_a_copy_of_the_tree_is_enough(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout, so there is no list of files to copy")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    for name in names:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(source):
            continue  # removed, but not yet committed
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif not name.startswith(("tests/", "train/data/texts/")):
            target.write_bytes(source.read_bytes())
    arguments = ("--device", "cpu", "--quick", "--records", "kept", "--commit", "0123abc")
    done = run_script(tmp_path, *arguments)
    assert done.returncode in (0, 1), done.stderr
    record = read_record(tmp_path / "kept" / "gpu_check.json")
    assert record["commit"] == "0123abc"
    assert record["command"] == "python benchmarks/gpu_check.py " + " ".join(arguments)
    results = record["results"]
    parts = {check["name"].split("/")[0] for check in results["checks"]}
    assert parts == {"kernels", "mixers", "models", "training", "timing"}
    assert {row["mode"] for row in results["timings"]} == {"forward", "forward+backward", "one token"}
    assert results["passed"] >= 40
    failed = [check["name"] for check in results["checks"] if check["status"] == "failed"]
    assert done.returncode == (1 if failed else 0), failed
    # whether kernels and mixers are right is the business of their own tests
    broken = [name for name in failed if not name.startswith(("kernels/", "mixers/"))]
    assert not broken, [check for check in results["checks"] if check["name"] in broken]


def test_a_tree_whose_links_were_lost_is_explained(tmp_path: Path) -> None:
    for name in ("benchmarks", "src/memzoo"):
        (tmp_path / name).mkdir(parents=True)
        for source in (ROOT / name).glob("*.py"):
            (tmp_path / name / source.name).write_bytes(source.read_bytes())
    (tmp_path / "src/memzoo/layers").write_text("../../layers")
    done = run_script(tmp_path, "--device", "cpu", "--quick")
    assert done.returncode == 2
    assert "a copy may have lost them" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_cases_hold_on_the_cpu(operation: str, dtype: torch.dtype) -> None:
    from gpu_cases import CASES

    for case in CASES:
        if case.operation == operation:
            assert case.check("torch", dtype, torch.device("cpu")) <= 1


def test_every_operation_has_cases() -> None:
    from gpu_cases import CASES

    assert {case.operation for case in CASES} == set(OPERATIONS)
    names = [(case.operation, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_a_wrong_kernel_is_found_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_cases
    import gpu_check

    right = gpu_cases.causal_conv

    def wrong(x: torch.Tensor, *others: object, **options: object):
        y, tail = right(x, *others, **options)
        if options["backend"] == "torch" and x.shape[1] > 1:
            y = y * 1.001
        return y, tail

    monkeypatch.setattr(gpu_cases, "causal_conv", wrong)
    arguments = ["--device", "cpu", "--only", "kernels/causal_conv", "--records", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    checks = read_record(tmp_path / "gpu_check.json")["results"]["checks"]
    failed = {check["name"] for check in checks if check["status"] == "failed"}
    cases = [case.name for case in gpu_cases.CASES if case.operation == "causal_conv"]
    assert len(checks) == len(cases) * (2 + 1 + 3), "auto, reference and torch in their precisions"
    assert failed >= {
        f"kernels/causal_conv/torch/{name}/{dtype}"
        for name in cases
        for dtype in ("float32", "float64")
        if not name.startswith("one token")
    }
    assert all("/torch/" in name for name in failed)
    assert "allowed" in capsys.readouterr().out


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    import gpu_check

    arguments = [
        "--device",
        "cpu",
        "--only",
        "kernels/decode_attention/reference",
        "--records",
        str(tmp_path),
    ]
    assert gpu_check.main(arguments) == 0
    path = tmp_path / "gpu_check.json"
    record = json.loads(path.read_text())
    whole = record["results"]["checks"]
    kept = {**whole[0], "seconds": 12345.0}
    record["results"]["checks"] = [kept]
    path.write_text(json.dumps(record))
    assert gpu_check.main([*arguments, "--resume"]) == 0
    again = read_record(path)["results"]["checks"]
    assert again[0] == kept, "what was done is not done again"
    assert [check["name"] for check in again] == [check["name"] for check in whole]


def test_a_backend_that_covers_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check

    monkeypatch.setattr(gpu_check, "available_backends", lambda operation: ("reference", "flash_attn"))
    arguments = ["--device", "cpu", "--only", "causal_conv/flash_attn", "--records", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    results = read_record(tmp_path / "gpu_check.json")["results"]
    assert results["failed"] == 1
    assert results["checks"][-1]["name"] == "kernels/causal_conv/flash_attn/covers a case"
    assert results["refused"] == len(results["checks"]) - 1 > 0


def test_a_name_that_fits_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_check

    assert gpu_check.main(["--device", "cpu", "--quick", "--only", "atention"]) == 2
    assert "'atention'" in capsys.readouterr().err
