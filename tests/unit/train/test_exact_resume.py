"""A run resumed from any checkpoint equals the run that was never stopped, bit for bit."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memzoo.train import random_state
from memzoo.train.callbacks import ExactResume

from .run_toys import Book, Restless, SaveAlways, toy_run

SETTINGS: dict[str, dict[str, Any]] = {
    "validation in mid-epoch, accumulation": {},
    "validation at the end of an epoch": {"val_check_interval": 1.0},
    "a number of steps": {"max_epochs": -1, "max_steps": 6},
    "a validation after the last step": {"max_epochs": -1, "max_steps": 3},
    "validation across epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "no validation": {"limit_val_batches": 0, "accumulate_grad_batches": 3},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)


def weights(module: Restless) -> list[torch.Tensor]:
    return [*module.state_dict().values(), module.carried]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path, name: str) -> None:
    settings = SETTINGS[name]
    book = Book()
    saver = SaveAlways(tmp_path, book)
    whole = weights(toy_run(saver, book=book, **settings))
    assert len(saver.logged) >= 10
    undisturbed = Book()
    again = weights(toy_run(book=undisturbed, **settings))
    assert all(map(torch.equal, whole, again)), "saving changes nothing"
    assert undisturbed.lines == book.lines
    for path, logged in saver.logged.items():
        rest = Book()
        rest.lines = dict(logged)  # another value for a line that is there already fails
        resumed = weights(toy_run(book=rest, path=path, **settings))
        assert all(map(torch.equal, whole, resumed)), path.name
        assert rest.lines == book.lines, path.name


def test_a_run_resumed_twice_leads_to_the_same_end(tmp_path: Path) -> None:
    """Also where the second checkpoint is written before anything was read since the first."""
    book = Book()
    saver = SaveAlways(tmp_path / "first", book)
    whole = weights(toy_run(saver, book=book))
    # the third batch, after which a validation is due, and the last of the epoch
    for number in (2, 9):
        rest = Book()
        again = SaveAlways(tmp_path / f"second_{number}", rest)
        toy_run(again, book=rest, path=list(saver.logged)[number])
        for path, logged in list(again.logged.items())[:3]:
            last = Book()
            last.lines = dict(logged)
            assert all(map(torch.equal, whole, weights(toy_run(book=last, path=path)))), path.name
            assert last.lines.items() <= book.lines.items()


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    book, other = Book(), Book()
    saver = SaveAlways(tmp_path, book)
    whole = weights(toy_run(saver, book=book, workers=2))
    assert all(map(torch.equal, whole, weights(toy_run(book=other))))
    assert other.lines == book.lines
    for path in list(saver.logged)[3:20:6]:
        rest = Book()
        assert all(map(torch.equal, whole, weights(toy_run(book=rest, path=path, workers=2)))), path.name


def test_without_it_a_resumed_run_differs(tmp_path: Path) -> None:
    """The run above is able to tell."""
    book = Book()
    saver = SaveAlways(tmp_path, book)
    whole = weights(toy_run(saver, book=book))
    path = next(path for path in saver.logged if path.name.endswith("batch"))
    for field in ("_random", "_gradients"):
        with pytest.MonkeyPatch.context() as patch:
            load = ExactResume.on_load_checkpoint

            def forgetful(self: ExactResume, *args: Any, field: str = field, load: Any = load) -> None:
                load(self, *args)
                setattr(self, field, None if field == "_random" else {})

            patch.setattr(ExactResume, "on_load_checkpoint", forgetful)
            resumed = weights(toy_run(book=Book(), path=path))
            assert not all(map(torch.equal, whole, resumed)), field


def test_generators_are_put_back() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    state = random_state.capture()
    first = draws()
    with random_state.untouched():
        assert draws() != first
    second = draws()
    random_state.restore(state)
    assert draws() == first
    assert draws() == second
