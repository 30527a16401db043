"""State of a token mixer: a value that holds everything the mixer remembers about the tokens it has read.

A state is a dataclass of tensors (batch rows first), of further states, or tuples of states. It is never
changed in place for the caller unless the caller donates it. ``num_tokens`` and every field marked
``host_field()`` live on the CPU, so that reading a counter never waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    def restart(self: StateT, rows: Tensor, empty: StateT) -> StateT:
        """Lets some sequences begin anew and leaves the others as they are, to the bit.

        Args:
            rows: (N,) bool, True = this row begins anew.
            empty: the memory it begins with, ``init_state(N)`` of the same mixer or model; a learned one gets
                its gradient.

        Returns:
            A state of this batch size, in the dtypes of this one. Where one of the two has more slots, the
            other's are followed by unused ones. This state itself where no row begins anew.

        Raises:
            ValueError: another number of rows, or a state with other fields.
        """
        self.check_usable()
        size = self.batch_size
        if rows.shape != (size,) or rows.dtype != torch.bool or empty.batch_size != size:
            raise ValueError(
                f"this state has {size} rows; restart needs a boolean for each and an empty state as large, "
                f"got {rows.dtype} {tuple(rows.shape)} and {empty.batch_size} rows. Use init_state({size})."
            )
        return _restart(self, empty, rows.cpu()) if rows.any() else self

    def num_bytes(self) -> int:
        """Bytes of all tensors, counters included."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())

    def to_plain(self) -> dict[str, Any]:
        """The state as plain data, to be kept inside something larger: names, and copies of the tensors."""
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.named_tensors()}
        return {"version": FORMAT_VERSION, "state": _describe(self), "tensors": tensors}

    @staticmethod
    def from_plain(data: Mapping[str, Any]) -> State:
        """The state that `to_plain` described: only state types known to this process are built.

        Raises:
            ValueError: damaged, of another version, or of an unknown state type.
        """
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"the state has format {data.get('version')!r}, this version reads {FORMAT_VERSION}. "
                "Save it again with a matching version."
            )
        tensors = dict(data["tensors"])
        try:
            state = _rebuild(data["state"], tensors, "")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the state is damaged: {error}. Save it again.") from error
        if tensors:
            raise ValueError(f"it holds tensors that belong to no field: {sorted(tensors)}. Save it again.")
        return state

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file (under a temporary name in the same folder, then renamed).

        Args:
            path: file to write; its folder must exist.
            notes: short texts to keep beside the state, such as what made it; `read_notes` returns them.
        """
        from safetensors.torch import save as safetensors_bytes

        tensors = self.to_plain()["tensors"]
        described, said = json.dumps(_describe(self)), json.dumps(dict(notes or {}))
        metadata = {
            "memzoo_state_version": str(FORMAT_VERSION),
            "memzoo_state": described,
            "memzoo_notes": said,
            "memzoo_sha256": _digest(tensors, described, said),
        }
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
        metadata, tensors = _read_file(path)
        try:
            described = metadata["memzoo_state"]
            digest = _digest(tensors, described, metadata.get("memzoo_notes", "{}"))
            if digest != metadata.get("memzoo_sha256", digest):
                raise ValueError("its content differs from its SHA-256. Save the state again.")
            plain = {"version": FORMAT_VERSION, "state": json.loads(described), "tensors": tensors}
            state = State.from_plain(plain)
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return state.to(device)

    @staticmethod
    def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
        """The notes beside a saved state; its tensors are not read.

        Raises:
            ValueError: not a state file, damaged, or of another version.
        """
        metadata, _ = _read_file(path, with_tensors=False)
        try:
            notes = json.loads(metadata.get("memzoo_notes", "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}. Save the state again.") from error
        if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
            raise ValueError(f"{path} is damaged: its notes are no texts. Save the state again.")
        return notes

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


def _restart(old: StateT, new: StateT, rows: Tensor) -> StateT:
    """`old` with the given rows of `new`; see `State.restart`."""
    if type(old) is not type(new):
        raise ValueError(
            f"a {type(old).__name__} cannot begin anew as a {type(new).__name__}. "
            "Give the empty state of the same mixer."
        )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(old):
        left, right = getattr(old, field.name), getattr(new, field.name)
        if isinstance(left, State) and isinstance(right, State):
            values[field.name] = _restart(left, right, rows)
        elif isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right):
            values[field.name] = tuple(_restart(a, b, rows) for a, b in zip(left, right, strict=True))
        elif isinstance(left, Tensor) and isinstance(right, Tensor):
            values[field.name] = _restart_tensor(left, right.to(left), rows, field.name)
        elif left is None and right is None:
            values[field.name] = None
        else:
            raise ValueError(
                f"{field.name} of the {type(old).__name__} is another thing than in the empty state. "
                "Give the empty state of the same mixer."
            )
    return type(old)(**values)


def _restart_tensor(old: Tensor, new: Tensor, rows: Tensor, name: str) -> Tensor:
    if old.dim() > 1:
        slots = max(old.shape[1], new.shape[1])
        old, new = _with_slots(old, slots), _with_slots(new, slots)
    if old.shape != new.shape:
        raise ValueError(
            f"{name} has the shape {tuple(old.shape)}, in the empty state {tuple(new.shape)}. "
            "Give the empty state of the same mixer."
        )
    return torch.where(rows.to(old.device).view(-1, *(1,) * (old.dim() - 1)), new, old)


def _with_slots(tensor: Tensor, slots: int) -> Tensor:
    """(N, slots, ...), with unused (zero) ones at the end."""
    missing = slots - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)


def _flatten(state: State) -> tuple[list[Any], list[str]]:
    names = [field.name for field in dataclasses.fields(state)]
    return [getattr(state, name) for name in names], names


def _read_file(
    path: str | os.PathLike[str], with_tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a state file of this version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
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
    return metadata, tensors


def _digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 of all tensors, by name, and of the texts beside them."""
    found = hashlib.sha256("\0".join(texts).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        # a tensor of one element may have any stride, which a view of its bytes refuses: hence the clone
        flat = tensors[name].reshape(-1).clone(memory_format=torch.contiguous_format)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


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
