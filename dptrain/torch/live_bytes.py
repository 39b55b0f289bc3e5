"""Bytes of tensors that are alive at each moment of a computation, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context; afterwards ``moments`` holds (operation, bytes alive) of each new allocation.

    Counts what was allocated inside, once however many views show it, until it is freed. Scratch
    space within one kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[tuple[str, int]] = []
        self._known: dict[int, weakref.finalize] = {}
        self._alive = 0

    def forget(self, existing: Any) -> None:
        """Do not count these tensors when an operation returns a view of them."""
        for t in tree_leaves(existing):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self._known[storage._cdata] = weakref.finalize(storage, self._known.pop, storage._cdata, None)

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(str(func), t.untyped_storage())
        return out

    def _see(self, operation: str, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._alive += size
        self._known[key] = weakref.finalize(storage, self._free, key, size)
        self.moments.append((operation, self._alive))

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self._alive -= size
