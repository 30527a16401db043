"""The loops over tiles as operations of torch.compile: the same numbers, shapes and gradients."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memzoo.kernels import attention
from memzoo.testing import assert_close


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def results(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((x * x.detach().cos()).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("window", [(None, 0), (4, 2)])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int | None, int], return_stats: bool
) -> None:
    inputs = draw((2, 20, 4, 5), (2, 20, 2, 5), (2, 20, 2, 3))

    def run() -> list[Tensor]:
        out = attention(
            *inputs, window_size=window[0], num_sinks=window[1], return_stats=return_stats, backend="torch"
        )
        return results([x for x in out if x is not None], inputs)

    expected = run()
    module = importlib.import_module("memzoo.kernels.attention.chunked")
    monkeypatch.setattr(module, "is_compiling", lambda: True)
    for actual, wanted in zip(run(), expected, strict=True):
        assert_close("as one operation", actual, wanted, 1e-12)


def test_operations_are_declared_rightly() -> None:
    q, k, v = draw((4, 2, 6, 5), (4, 6, 5), (4, 6, 3))
    tile = [0, 4, 0, 6, 0, 0, 0, 6, 0, 0]
    for return_stats in (False, True):
        arguments = (q, k, v, tile, 3, 0.5, return_stats)
        torch.library.opcheck(torch.ops.memzoo.tiled_attention.default, arguments)


def test_no_operation_is_defined_twice() -> None:
    """transformers looks for a package `kernels`, and finds our folder when Python starts in its parent."""
    root = Path(__file__).parents[3]
    code = (
        "import sys; sys.path.insert(0, 'src'); import memzoo.kernels; import transformers.modeling_utils; "
        "import kernels; twice = [name for name in sys.modules if name.startswith('kernels.')]; "
        "assert kernels.__file__ == sys.argv[1] and not twice, twice"
    )
    command = [sys.executable, "-c", code, str(root / "kernels" / "__init__.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
