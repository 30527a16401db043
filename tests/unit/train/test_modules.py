"""The language-model module: losses without all logits, recomputation, precision, carried memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.callbacks import SaveModelFolder
from memzoo.train.checkpointing import FolderCheckpointIO
from memzoo.train.data.batches import BatchSource, ResumableLoader, TokenBatch
from memzoo.train.data.task_module import TaskDataModule
from memzoo.train.data.text import TextDataModule
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig
from memzoo.train.sizes import draw_sizes, step_generator

VOCAB, ROWS, WINDOW, BATCHES = 31, 3, 6, 8
# for every row the batches in which a document begins
STARTS = ({0, 3, 4}, {0, 2, 5}, {0})
HYBRID = [
    {"type": "sliding_window", "window_size": 3, "num_heads": 2},
    {"type": "linear_attention", "num_heads": 2},
    {"type": "attention", "num_heads": 2},
]

SMALL = HYBRID[:1]


def config(layers: list[dict[str, Any]] = HYBRID, **fields: Any) -> ModelConfig:
    return ModelConfig(vocab_size=VOCAB, d_model=8, layers=layers, initializer_range=0.3, **fields)


def build(layers: list[dict[str, Any]] = HYBRID, **options: Any) -> LanguageModelModule:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=0.01, schedule="constant")
    return LanguageModelModule(config(layers), optimizer, **{"mixer_init_scale": 1.0} | options)


class Documents(BatchSource):
    """Rows that go on from batch to batch; `seed` draws the tokens."""

    def __init__(self, seed: int = 0, *, batches: int = BATCHES, rows: int = ROWS) -> None:
        self.num, self.rows = batches, rows
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (rows, batches * WINDOW + 1), generator=generator)

    @property
    def num_batches(self) -> int:
        return self.num

    def batch(self, epoch: int, index: int) -> TokenBatch:
        start = index * WINDOW
        part = self.tokens[:, start : start + WINDOW + 1].roll(epoch, 0)
        resets = torch.tensor([index in STARTS[row] for row in range(self.rows)])
        return TokenBatch(part[:, :-1], part[:, 1:].clone(), resets=resets)


class Data(LightningDataModule):
    def __init__(self, source: BatchSource | None = None) -> None:
        super().__init__()
        self.source = source or Documents()

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.source)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.source if len(self.source) < BATCHES else Documents(1, batches=3))


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**defaults | options)


def labels_for(ids: Tensor, share: float = 0.5) -> Tensor:
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < share
    return torch.where(keep, ids.roll(-1, 1), -100)


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


class Saved:
    """Counts the numbers that a forward pass keeps for the backward pass."""

    numbers = 0

    def pack(self, x: Tensor) -> Tensor:
        self.numbers += x.numel()
        return x


def test_logits_of_all_positions_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr("memzoo.train.modules.default_chunk_size", lambda vocab_size: 16)
    chunked = importlib.import_module("memzoo.kernels.linear_cross_entropy")
    monkeypatch.setattr(chunked, "default_chunk_size", lambda vocab_size: 16)
    torch.manual_seed(0)
    model = ModelConfig(vocab_size=4096, d_model=8, layers=HYBRID[:2])
    module = LanguageModelModule(model, recompute=True)
    ids = torch.arange(512)[None]
    largest = max(16, 8) * 4096  # logits of a chunk; the weight has 8 * 4096
    for labels in (ids, labels_for(ids)):
        with LargestTensor() as seen:
            module.training_step(TokenBatch(ids, labels), 0).backward()
        assert seen.largest <= largest
        with LargestTensor() as seen:
            monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
            module.validation_step(TokenBatch(ids, labels), 0)
        assert seen.largest <= largest
    with LargestTensor() as seen:
        module.model(ids)
    assert seen.largest == 512 * 4096  # the counter counts


def test_evaluation_weights_positions_and_examples(tmp_path: Path) -> None:
    module = build()

    class Uneven(Documents):
        def batch(self, epoch: int, index: int) -> TokenBatch:
            batch = super().batch(epoch, index)
            if index == 2:  # nothing asked
                return TokenBatch(batch.input_ids, torch.full_like(batch.labels, -100))
            return TokenBatch(batch.input_ids, labels_for(batch.labels, 0.2 + 0.5 * index))

    source = Uneven(batches=3)
    (found,) = trainer(tmp_path).validate(module, Data(source), verbose=False)
    losses, shares = [], []
    for index in (0, 1):
        batch = source.batch(0, index)
        logits = module.model(batch.input_ids).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none"))
        asked = batch.labels != -100
        right = (logits.argmax(-1) == batch.labels) & asked
        shares += [float(r.sum() / a.sum()) for r, a in zip(right, asked, strict=True) if a.any()]
        losses[-1] = losses[-1][asked.flatten()]
    assert found["val_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)


@pytest.mark.parametrize("carry_state", [False, True])
def test_recomputing_gives_the_same_gradients(carry_state: bool) -> None:
    gradients = []
    for recompute in (False, True):
        module = build(recompute=recompute, carry_state=carry_state)
        for index in range(2):
            module.training_step(Documents().batch(0, index), index).backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputing_keeps_less() -> None:
    kept = []
    for recompute in (False, True):
        module, saved = build(recompute=recompute), Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            module.training_step(Documents(rows=1).batch(0, 0), 0)
        kept.append(saved.numbers)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"carry_state": True}])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_trains_as_float32_does(
    tmp_path: Path, precision: str, options: dict[str, bool]
) -> None:
    losses = {}
    for name in ("32-true", precision):
        module = build(**options)
        run = trainer(tmp_path, precision=name, max_epochs=3)
        run.fit(module, Data())
        losses[name] = {key: float(value) for key, value in run.callback_metrics.items()}
        wanted = torch.bfloat16 if name == "bf16-true" else torch.float32
        assert {p.dtype for p in module.parameters()} == {wanted}
    for key, value in losses["32-true"].items():
        assert losses[precision][key] == pytest.approx(value, abs=0.1)


def test_a_mask_hides_padding() -> None:
    module = build()
    batch = Documents().batch(0, 0)
    mask = torch.ones(ROWS, WINDOW, dtype=torch.bool)
    mask[0, 4:] = mask[2, :2] = False
    labels = batch.labels.masked_fill(~mask, -100)
    losses = []
    for filler in (0, 7):
        ids = batch.input_ids.masked_fill(~mask, filler)
        losses.append(module.training_step(TokenBatch(ids, labels, mask=mask), 0))
    assert torch.equal(*losses)
    rows = [(batch.input_ids[r][mask[r]], batch.labels[r][mask[r]]) for r in range(ROWS)]
    logits = [module.model(ids[None]).logits[0] for ids, _ in rows]
    expected = F.cross_entropy(torch.cat(logits), torch.cat([wanted for _, wanted in rows]))
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_labels_costs_nothing_and_changes_nothing() -> None:
    module = build()
    ids = Documents().batch(0, 0).input_ids
    loss = module.training_step(TokenBatch(ids, torch.full_like(ids, -100)), 0)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


# ------------------------------------------------------------------ carried memory


def loss_of_whole_documents(model: MemoryLM, source: Documents, num_batches: int) -> float:
    """Mean cross-entropy of the first batches, each document read at once."""
    losses = []
    for row in range(source.rows):
        borders = sorted({*(s for s in STARTS[row] if s < num_batches), num_batches})
        for start, end in zip(borders, borders[1:], strict=False):
            tokens = source.tokens[row, start * WINDOW : end * WINDOW + 1]
            logits = model(tokens[None, :-1]).logits[0]
            losses.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_windows_of_a_document_read_one_after_another_are_the_document(tmp_path: Path) -> None:
    source = Documents(batches=7)
    for carry_state in (True, False):
        module = build(carry_state=carry_state)
        (found,) = trainer(tmp_path).validate(module, Data(source), verbose=False)
        expected = loss_of_whole_documents(module.model, source, 7)
        assert (found["val_loss"] == pytest.approx(expected, rel=1e-5)) == carry_state
        assert trainer(tmp_path).validate(module, Data(source), verbose=False) == [found]


def test_contiguous_text_is_read_as_whole_documents(tmp_path: Path) -> None:
    texts = [f"{n} " + "abc" * (5 + 7 * n) for n in range(7)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = TextDataModule(
        files=str(tmp_path / "texts.jsonl"),
        val_files=str(tmp_path / "texts.jsonl"),
        contiguous=True,
        seq_len=8,
        batch_size=3,
        max_val_windows=None,
    )
    torch.manual_seed(0)
    model = ModelConfig(vocab_size=257, d_model=8, layers=HYBRID, initializer_range=0.3)
    module = LanguageModelModule(model, OptimizerConfig(), 1.0, carry_state=True)
    (found,) = trainer(tmp_path).validate(module, data, verbose=False)
    losses = []
    for text in texts:
        tokens = torch.tensor([*text.encode(), 256])
        logits = module.model(tokens[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
    assert found["val_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    trainer(tmp_path, max_epochs=1).fit(module, data)
    assert all(torch.isfinite(weight).all() for weight in module.parameters())


def train_by_hand(module: LanguageModelModule, epochs: int, accumulate: int) -> None:
    """Carried training written out: a loop over batches, states of rows selected and joined."""
    optimizer = module.configure_optimizers()["optimizer"]
    source, states = Documents(), [None] * ROWS
    for epoch in range(epochs):
        for index in range(BATCHES):
            batch = source.batch(epoch, index)
            total = torch.zeros(())
            for row in range(ROWS):
                state = None if batch.resets[row] else states[row]
                ids, labels = batch.input_ids[row : row + 1], batch.labels[row]
                out = module.model(ids, state, return_state=True)
                total = total + F.cross_entropy(out.logits[0], labels) / ROWS
                states[row] = out.state.detach()
            (total / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_carries_the_memory_without_its_gradient(tmp_path: Path, accumulate: int) -> None:
    module, by_hand = build(carry_state=True), build()
    # validation in between must leave the memory of the training alone
    run = trainer(tmp_path, accumulate_grad_batches=accumulate, val_check_interval=2)
    run.fit(module, Data())
    by_hand.trainer = run
    train_by_hand(by_hand, 2, accumulate)
    for name, parameter in by_hand.named_parameters():
        error = (module.state_dict()[name] - parameter).abs().max()
        assert error < 1e-4, name
    stateless = build()
    trainer(tmp_path, accumulate_grad_batches=accumulate).fit(stateless, Data())
    moved = [(a - b).abs().max() for a, b in zip(stateless.parameters(), by_hand.parameters(), strict=True)]
    assert max(moved) > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    tmp_path: Path, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(name: str, checkpoint: Path | None = None, **options: Any) -> LanguageModelModule:
        module = build(carry_state=True, recompute=recompute)
        saves = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        settings = {"callbacks": [saves], "enable_checkpointing": True, "plugins": [FolderCheckpointIO()]}
        run = trainer(tmp_path, val_check_interval=4, **settings | options)
        run.fit(module, Data(), ckpt_path=checkpoint)
        return module

    whole = fit("whole")
    for step in (3, 6, 9):  # inside a document of some rows; 9 in the second epoch
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        resumed = fit("resumed", checkpoint)
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), name
        states = [module.carried._states["train"].named_tensors() for module in (whole, resumed)]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*states, strict=True))
    forgetful = build(carry_state=True)
    monkeypatch.setattr(forgetful.carried, "load_plain", lambda data: None)
    trainer(tmp_path, plugins=[FolderCheckpointIO()]).fit(
        forgetful, Data(), ckpt_path=tmp_path / "whole" / "step=3.ckpt"
    )
    assert not torch.equal(forgetful.model.head_weight, whole.model.head_weight), "the memory mattered"


@pytest.mark.parametrize("changes", [{}, {"lr": 0.5, "weight_decay": 0.3, "beta1": 0.5}])
def test_a_resumed_run_takes_the_rates_it_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, float]
) -> None:
    def fit(checkpoint: Path | None = None, **changes: float) -> list[dict[str, Any]]:
        module = build(SMALL)
        module.optimizer_config = replace(module.optimizer_config, schedule="linear", **changes)
        run = trainer(tmp_path, max_epochs=-1, max_steps=3, **options)
        run.fit(module, Data(), ckpt_path=checkpoint)
        keys = ("lr", "initial_lr", "weight_decay", "eps")
        return [
            {key: group[key] for key in keys} | {"beta1": group["betas"][0]}
            for group in run.optimizers[0].param_groups
        ]

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"callbacks": [saves], "enable_checkpointing": True, "plugins": [FolderCheckpointIO()]}
    fit()
    resumed, whole = fit(tmp_path / "step=2.ckpt", **changes), fit(**changes)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours == (pytest.approx(theirs) if changes else theirs)
    told = "goes on with another optimizer than its checkpoint: lr 0.5 instead of 0.01, weight_decay 0.3"
    assert (told in caplog.text) is bool(changes)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, run: Trainer, module: LanguageModelModule, *args: Any) -> None:
            if run.global_step == 3:
                module.model.embed_tokens.weight.data[0, 0] = torch.nan

    saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    options = {
        "callbacks": [Breaks(), saves],
        "enable_checkpointing": True,
        "plugins": [FolderCheckpointIO()],
    }
    with pytest.raises(
        ValueError, match=r"is not finite after step 4, .* --ckpt_path .*\.ckpt, with a lower"
    ):
        trainer(tmp_path, **options).fit(build(SMALL), Data())
    weights = FolderCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values())
    with pytest.raises(ValueError, match=r"embed_tokens.weight is not finite .* no model is written"):
        trainer(tmp_path, callbacks=[Breaks(), SaveModelFolder(str(tmp_path / "model"))]).fit(
            build(SMALL), Data()
        )
    assert not list((tmp_path / "model").iterdir())


def test_a_checkpoint_without_memory_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint: dict[str, Any] = {}
    build().on_save_checkpoint(checkpoint)
    build(carry_state=True).on_load_checkpoint(checkpoint)
    assert "holds no carried state" in caplog.text
    module = build(carry_state=True)
    module(Documents().batch(0, 0))
    module.on_save_checkpoint(checkpoint)
    build().on_load_checkpoint(checkpoint)  # a run that carries nothing may go on from it
    window = module.carried._states["train"].layers[0]
    checkpoint["memzoo"]["carried"]["train"] = window.to_plain()
    with pytest.raises(ValueError, match="carried state is a WindowCache"):
        build(carry_state=True).on_load_checkpoint(checkpoint)


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    module = build(carry_state=True)
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="one sequence per row, got a packed batch"):
        module(TokenBatch(ids, ids, cu_seqlens=torch.tensor([0, 2, 6])))
    with pytest.raises(ValueError, match="this data says of none that it does"):
        module(TokenBatch(ids, ids))
    module(Documents().batch(0, 0))
    with pytest.raises(ValueError, match="got 2 rows after 3"):
        module(Documents(rows=2).batch(0, 1))
    several = trainer(tmp_path, devices=2, strategy="ddp_spawn")
    module = build(carry_state=True)
    module.trainer = several
    with pytest.raises(
        ValueError, match="as carry_state needs them, can be read by one training process only, got 2"
    ):
        module.setup("fit")


def test_sizes_are_drawn_anew_in_every_step_and_never_in_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(SMALL, sizes={"window_size": (1, 9), "num_sinks": (0, 3)})
    seen: list[tuple[bool, dict[str, int]]] = []
    forward = MemoryLM.forward

    def recording(self: MemoryLM, *args: Any, overrides: Any = None, **options: Any) -> Any:
        seen.append((self.training, dict(overrides)))
        return forward(self, *args, overrides=overrides, **options)

    monkeypatch.setattr(MemoryLM, "forward", recording)
    data = TaskDataModule(
        {"type": "needle", "key_vocab": 8, "value_vocab": 8, "noise_vocab": 8},
        train_lengths=[16],
        num_batches=6,
        num_eval_examples=2,
    )
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    ).fit(module, data)
    trained = [sizes for is_training, sizes in seen if is_training]
    assert [sizes for is_training, sizes in seen if not is_training] == [{}]
    assert len(trained) == 6
    assert all(1 <= sizes["window_size"] <= 9 and 0 <= sizes["num_sinks"] <= 3 for sizes in trained)
    assert len({sizes["window_size"] for sizes in trained}) > 2
    assert trained == [draw_sizes(module.sizes, step_generator(0, step)) for step in range(6)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": {"windows": (1, 2)}}, "unknown size 'windows'.*window_size"),
        ({"sizes": {"window_size": (3, 2)}}, "window_size must go from at least 1"),
        ({"sizes": {"window_size": (1, 2)}, "carry_state": True}, "do not fit a memory that goes on"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SMALL, **options)
