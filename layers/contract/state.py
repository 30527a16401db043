"""State of a token mixer: a value that holds everything the mixer remembers about the tokens it has read.

A state is a dataclass of tensors (batch rows first), of further states, or tuples of states. It is never
changed in place for the caller unless the caller donates it. ``num_tokens`` and every field marked
``host_field()`` live on the CPU, so that reading a counter never waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FORMAT_VERSION = 1

StateT = TypeVar("StateT", bound="State")


def host_field() -> Any:
    """Declares a counter: an integer tensor (N, ...) that stays on the CPU wherever the state moves."""
    return dataclasses.field(metadata={"host": True})


@dataclass(kw_only=True)
class State:
    """Base of all states.

    Attributes:
        num_tokens: (N,) int64 on the CPU, tokens that each of the N sequences has read so far.
    """

    num_tokens: Tensor = host_field()

    _types: ClassVar[dict[str, type[State]]] = {}
    _was_donated: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = State._types.get(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a state type named {cls.__name__!r} exists already, in {known.__module__}. Choose another "
                "name: saved states are known by it."
            )
        State._types[cls.__name__] = cls

        def rebuild(leaves: Iterable[Any], names: list[str]) -> State:
            return cls(**dict(zip(names, leaves, strict=True)))

        pytree.register_pytree_node(cls, _flatten, rebuild)

    @property
    def batch_size(self) -> int:
        return self.num_tokens.shape[0]

    def map(self: StateT, fn: Callable[[Tensor], Tensor], *, include_host: bool = True) -> StateT:
        """Applies `fn` to every tensor, nested ones included; to counters unless `include_host` is False."""
        self.check_usable()
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                skip = field.metadata.get("host", False) and not include_host
                values[field.name] = value if skip else fn(value)
            elif isinstance(value, State):
                values[field.name] = value.map(fn, include_host=include_host)
            elif isinstance(value, tuple):
                values[field.name] = tuple(item.map(fn, include_host=include_host) for item in value)
            else:
                values[field.name] = value
        return type(self)(**values)

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yields (dotted name, tensor) for every tensor, in field order."""
        self.check_usable()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield prefix + field.name, value
            elif isinstance(value, State):
                yield from value.named_tensors(f"{prefix}{field.name}.")
            elif isinstance(value, tuple):
                for index, item in enumerate(value):
                    yield from item.named_tensors(f"{prefix}{field.name}.{index}.")

    def detach(self: StateT) -> StateT:
        """The same numbers, cut from the autograd graph (tensors are shared)."""
        return self.map(Tensor.detach)

    def clone(self: StateT) -> StateT:
        """An independent copy."""
        return self.map(Tensor.clone)

    def to(self: StateT, device: torch.device | str) -> StateT:
        """Moves the tensors to `device`; counters stay on the CPU."""
        return self.map(lambda tensor: tensor.to(device), include_host=False)

    def select(self: StateT, rows: Tensor | Sequence[int]) -> StateT:
        """Keeps, reorders or repeats batch rows (beam search, prefix caching).

        Args:
            rows: integer indices, or a (N,) boolean mask of rows to keep.

        Raises:
            ValueError: a row is outside the batch, or a mask has another length.
        """
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            if index.shape != (self.batch_size,):
                raise ValueError(
                    f"a row mask for this state needs shape ({self.batch_size},), got {tuple(index.shape)}. "
                    "Give one boolean per batch row, or a list of row numbers."
                )
            index = index.nonzero().squeeze(-1)
        index = index.reshape(-1).to(torch.int64).cpu()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.batch_size):
            raise ValueError(
                f"rows {index.tolist()} asked from a state of batch size {self.batch_size}. "
                f"Give row numbers from 0 to {self.batch_size - 1}."
            )
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def num_bytes(self) -> int:
        """Bytes of all tensors, counters included."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file (under a temporary name in the same folder, then renamed)."""
        from safetensors.torch import save as safetensors_bytes

        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.named_tensors()}
        metadata = {"memzoo_state_version": str(FORMAT_VERSION), "memzoo_state": json.dumps(_describe(self))}
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(safetensors_bytes(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Reads what `save` wrote: only state types known to this process, nothing in the file is executed.

        Raises:
            ValueError: not a state file, damaged, of another version, or of an unknown state type.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} is not a readable state file ({error}). Save the state again with State.save."
            ) from error
        version = metadata.get("memzoo_state_version")
        if version != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} has state format {version!r}, this version reads {FORMAT_VERSION}. "
                "Give a file written by State.save of a matching version."
            )
        try:
            state = _rebuild(json.loads(metadata["memzoo_state"]), tensors, "")
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}. Save the state again.") from error
        if tensors:
            raise ValueError(
                f"{path} holds tensors that belong to no field: {sorted(tensors)}. Save the state again."
            )
        return state.to(device)

    def check_usable(self) -> None:
        """Raises ValueError when the state was donated to a step and must not be read any more."""
        if self._was_donated:
            raise ValueError(
                f"this {type(self).__name__} was given away with donate=True and its memory has been reused. "
                "Use the state that step returned, or call state.clone() before donating."
            )

    def poison(self) -> None:
        """Marks the state, nested ones included, as donated."""
        self._was_donated = True  # type: ignore[misc]  # an instance flag that shadows the class default
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, State):
                    item.poison()


def _flatten(state: State) -> tuple[list[Any], list[str]]:
    names = [field.name for field in dataclasses.fields(state)]
    return [getattr(state, name) for name in names], names


def _describe(state: State) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, State):
            fields[field.name] = _describe(value)
        elif isinstance(value, tuple):
            fields[field.name] = [_describe(item) for item in value]
        else:
            fields[field.name] = None if value is None else "tensor"
    return {"type": type(state).__name__, "fields": fields}


def _rebuild(tree: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> State:
    if tree["type"] not in State._types:
        raise ValueError(
            f"the file holds a state of type {tree['type']!r}, known types are {sorted(State._types)}. "
            "Import the layer that defines it first."
        )
    values: dict[str, Any] = {}
    for name, item in tree["fields"].items():
        if isinstance(item, dict):
            values[name] = _rebuild(item, tensors, f"{prefix}{name}.")
        elif isinstance(item, list):
            values[name] = tuple(
                _rebuild(part, tensors, f"{prefix}{name}.{i}.") for i, part in enumerate(item)
            )
        else:
            values[name] = None if item is None else tensors.pop(prefix + name)
    return State._types[tree["type"]](**values)
