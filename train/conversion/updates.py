"""Which parameters a stage trains, and low-rank updates of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ...models.decoder import MemoryLM


def freeze_except(model: nn.Module, names: Iterable[str]) -> int:
    """Makes only the named parameters trainable, in float32 at least; returns how many numbers that are.

    Raises:
        ValueError: a name that the model does not have.
    """
    wanted = set(names)
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            wanted.discard(name)
            if parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()
            count += parameter.numel()
    if wanted:
        raise ValueError(
            f"the model has no parameters {sorted(wanted)[:5]}. Take names from model.named_parameters()."
        )
    return count


@contextmanager
def low_rank_updates(
    model: MemoryLM, *, rank: int, targets: Sequence[str], also_train: Iterable[str] = ()
) -> Iterator[nn.Module]:
    """Trains low-rank updates (Hu et al. 2021, through peft) of the named projections; on leaving they are
    merged into them.

    Args:
        rank: of the updates, which are scaled by 2.
        targets: names of linear layers, such as q_proj; every layer of that name gets an update.
        also_train: further parameters to train, by their name in `model`.

    Yields:
        the model with its updates.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    extra = set(also_train)
    freeze_except(model, extra)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=0.0, bias="none"
    )
    wrapped = LoraModel(model, {"default": config}, "default")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        elif name.removeprefix("model.").replace(".base_layer.", ".") in extra:
            parameter.requires_grad_(True)
    try:
        yield wrapped
    finally:
        wrapped.merge_and_unload()


@contextmanager
def scaled_rates(model: nn.Module, names: Iterable[str], scale: float) -> Iterator[None]:
    """Multiplies the own rates (tags) of the named parameters while it is entered."""
    parameters = dict(model.named_parameters())
    tagged = [(parameters[name], getattr(parameters[name], "_lr_scale", 1.0)) for name in names]
    for parameter, own in tagged:
        parameter._lr_scale = own * scale  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, own in tagged:
            parameter._lr_scale = own  # type: ignore[attr-defined]


def lora_size(model: MemoryLM, targets: Sequence[str]) -> int:
    """Trainable numbers per rank of `low_rank_updates` on the named layers."""
    return sum(module.in_features + module.out_features for _, module in linear_layers(model, targets))


def linear_layers(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer whose last name is one of `targets`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            yield name, module
