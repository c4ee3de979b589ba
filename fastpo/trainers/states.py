"""Named snapshots of a model's trainable parameters: the initial policy, earlier ones, a half step.

A state is kept once however many names it has, by a digest of its bytes; only the trainable
parameters are in it, so that with an adapter it is the adapter alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]

CURRENT = "current"
_INDEX = "states.json"


class StateError(RuntimeError):
    """A state is unknown, damaged, of another model, or does not fit the byte budget."""


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> State:
    """Copies of the trainable parameters, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in _trainable(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: State) -> None:
    """Write a snapshot into the parameters, in place and bit for bit.

    Raises:
        StateError: the names or shapes are not those of the model's trainable parameters.
    """
    parameters = _trainable(model)
    differing = [
        name
        for name in parameters.keys() | state.keys()
        if name not in parameters
        or name not in state
        or parameters[name].shape != state[name].shape
    ]
    if differing:
        remedy = "Use the model that the state was taken from."
        raise StateError(f"the trainable parameter {min(differing)} does not fit. {remedy}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


@contextlib.contextmanager
def temporarily(model: nn.Module, state: State) -> Iterator[None]:
    """The model with the parameters of a snapshot for a while, bit for bit its own afterwards."""
    back = snapshot(model)
    restore(model, state)
    try:
        yield
    finally:
        restore(model, back)


def digest(state: State) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class StateStore:
    """States of one model, by name, in memory and on disk.

    Args:
        model: whose trainable parameters are stored, without wrappers of distributed training.
        folder: where states are written that memory has no room for, and by :meth:`commit`; None
            keeps them in memory only.
        budget_bytes: of states in memory; None for no limit. The least recently used ones go first.

    Example:
        >>> store = StateStore(torch.nn.Linear(2, 2))
        >>> _ = store.save("initial")
        >>> with torch.no_grad():
        ...     _ = store.model.weight.zero_()
        >>> with store.using("initial"):
        ...     bool(store.model.weight.any())
        True
        >>> bool(store.model.weight.any())
        False
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path | None = None,
        budget_bytes: int | None = None,
    ):
        self.model = model
        self.folder = Path(folder) if folder is not None else None
        self.budget_bytes = budget_bytes
        self.names: dict[str, str] = {}
        self._held: OrderedDict[str, State] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def save(self, name: str) -> str:
        """Store the parameters as they are now under a name, over what had it; their digest."""
        return self.put(name, snapshot(self.model))

    def put(self, name: str, state: State) -> str:
        """Store a state, which the store then owns; its digest."""
        self.names[name] = key = digest(state)
        self._hold(key, state)
        return key

    def alias(self, name: str, existing: str) -> None:
        """Let a name stand for the state that another has now, or for the ``current`` one."""
        if existing == CURRENT:
            self.save(name)
        else:
            self.names[name] = self._key(existing)

    def drop(self, name: str) -> None:
        """Forget a name, and its state if no other name stands for it."""
        key = self.names.pop(name)
        if key not in self.names.values():
            self._held.pop(key, None)

    def get(self, name: str) -> State:
        """The tensors of a state; not to be written to."""
        key = self._key(name)
        if key not in self._held:
            self._hold(key, self._read(key))
        self._held.move_to_end(key)
        return self._held[key]

    def load(self, name: str) -> None:
        """Write a state into the model."""
        restore(self.model, self.get(name))

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The model in that state for a while; ``current`` is the model as it is."""
        is_current = name == CURRENT
        there = contextlib.nullcontext() if is_current else temporarily(self.model, self.get(name))
        with there:
            yield

    def commit(self, is_main: bool = True, **notes: Any) -> None:
        """Write names, states and notes to the folder; what no name stands for is removed there.

        The list of names is replaced last and at once: a crash leaves the commit before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_main:
            return
        for key in set(self.names.values()):
            if not self._path(key).exists():
                self._write(key, self._held[key])
        partial = self.folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps({"names": self.names, **notes}, indent=2), encoding="utf-8")
        partial.replace(self.folder / _INDEX)
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in self.names.values():
                path.unlink()

    def reopen(self) -> dict[str, Any]:
        """Take the names of the last commit; its notes, empty if there was none.

        Raises:
            StateError: the list of names is damaged, or a state is missing.
        """
        path = self.folder / _INDEX
        if not path.exists():
            return {}
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
            self.names = notes.pop("names")
        except (ValueError, KeyError) as error:
            raise StateError(f"{path}: damaged ({error}); restore it or start anew.") from error
        for name, key in self.names.items():
            if not self._path(key).exists():
                raise StateError(f"{self._path(key)}: missing; it is the state {name!r}.")
        return notes

    def _key(self, name: str) -> str:
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise StateError(f"state {name!r}: not stored; there are {known}.")
        return self.names[name]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _hold(self, key: str, state: State) -> None:
        self._held[key] = state
        self._held.move_to_end(key)
        for other in [k for k in self._held if k not in self.names.values()]:
            del self._held[other]
        size = lambda state: sum(t.nbytes for t in state.values())
        while self.budget_bytes is not None and len(self._held) > 1:
            if sum(map(size, self._held.values())) <= self.budget_bytes:
                break
            oldest = next(iter(self._held))
            if self.folder is None:
                remedy = "Raise budget_bytes, or give the store a folder to write to."
                raise StateError(f"the states exceed {self.budget_bytes} bytes. {remedy}")
            if not self._path(oldest).exists():
                self._write(oldest, self._held[oldest])
            del self._held[oldest]

    def _write(self, key: str, state: State) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Ranks write the same bytes: each its own file, the last one stays.
        partial = self.folder / f"{key}.{os.getpid()}.partial"
        save_file(state, partial)
        partial.replace(self._path(key))

    def _read(self, key: str) -> State:
        path = self._path(key)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path}: cannot be read ({error}).") from error
        if digest(state) != key:
            raise StateError(f"{path}: damaged, its values are not those that were written.")
        return state
