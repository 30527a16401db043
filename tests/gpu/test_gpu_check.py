"""Every check of `make gpu-check`, as tests: kernels, contract, models and bfloat16 training on CUDA."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch finds none", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_check

CUDA = torch.device("cuda")
CHECKS = [
    *gpu_check.kernel_checks(CUDA, quick=False),
    *gpu_check.mixer_checks(CUDA, splits=10),
    *gpu_check.model_checks(CUDA),
    *gpu_check.training_checks(CUDA, quick=False),
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_on_cuda(check: gpu_check.Check) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        assert check.run() < float("inf")
    except ValueError as error:
        if not check.may_refuse:
            raise
        pytest.skip(f"the backend does not cover this call: {error}")
