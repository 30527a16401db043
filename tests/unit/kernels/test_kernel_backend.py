"""Choice of a backend: what is available, who decides, what is said about it."""

import logging

import pytest
import torch

from memzoo.kernels import attention, available_backends, backend, causal_conv, use_backend

X = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(0))


def test_every_operation_has_its_definition_and_a_torch_form() -> None:
    for op in backend.OPERATIONS:
        assert available_backends(op)[:2] == ("reference", "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_external_kernels_need_cuda() -> None:
    assert available_backends("attention") == ("reference", "torch", "sdpa")
    assert available_backends("linear_attention") == ("reference", "torch")
    with pytest.raises(ValueError, match=r"needs CUDA and the package 'flash_attn'.*memzoo\[cuda\]"):
        attention(X, X, X, backend="flash_attn")
    with pytest.raises(ValueError, match="needs CUDA and the package 'fla'"), use_backend("fla"):
        pass


def test_a_broken_package_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    backend._imports.cache_clear()
    assert not backend._imports("fla.ops.simple_gla")
    backend._imports.cache_clear()


def choices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "memzoo.kernels.backend"]


def test_the_argument_wins_over_the_block_and_each_choice_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with use_backend("reference"):
                attention(X, X, X)
                attention(X, X, X, backend="torch")
                with use_backend("torch"):
                    attention(X, X, X)
                with use_backend("auto"):
                    attention(X, X, X)
            attention(X, X, X)
    assert choices(caplog) == [
        "attention runs on backend 'reference'",
        "attention runs on backend 'torch'",
        "attention runs on backend 'sdpa'",
    ]


def test_a_call_that_the_block_does_not_cover_chooses_for_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO), use_backend("sdpa"):
        attention(X, X, X, window_size=2)
        causal_conv(X[..., 0], torch.ones(2, 3))
    assert choices(caplog) == ["attention runs on backend 'torch'", "causal_conv runs on backend 'torch'"]


def test_the_block_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert not backend._forced


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="Did you mean 'linear_attention'"):
        available_backends("linear_atention")
    with pytest.raises(ValueError, match="Did you mean 'reference'"), use_backend("referense"):
        pass
