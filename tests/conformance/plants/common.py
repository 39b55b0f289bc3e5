"""What plants share: patches that are undone together, and trees of either engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock


class Patch:
    """Attributes of dptrain that are replaced until ``undo`` is left."""

    def __init__(self, undo: ExitStack) -> None:
        self.undo = undo

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """owner: an object, or the dotted name of a module."""
        owner = importlib.import_module(owner) if isinstance(owner, str) else owner
        self.undo.enter_context(mock.patch.object(owner, name, new))

    def around(self, owner: Any, name: str, change: Callable[[Callable], Callable]) -> None:
        """Replace a function by ``change(function)``."""
        owner = importlib.import_module(owner) if isinstance(owner, str) else owner
        self.replace(owner, name, change(getattr(owner, name)))


def mapped(engine: str, function: Callable, *trees: Any) -> Any:
    """Of sums or gradients: a dictionary of tensors in torch, any tree in JAX."""
    if engine == "torch":
        return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}
    import jax

    return jax.tree.map(function, *trees)


def zeros_like(x: Any) -> Any:
    return x * 0


class Tally:
    """What a faulty library knows of the logical batch that it is in, though it should not use it.

    Attributes:
        real: examples that were sampled; None before any batch.
        pieces: physical batches.
    """

    def __init__(self, patch: Patch, engine: str) -> None:
        self.real: int | None = None
        self.pieces = 0
        (self._watch_torch if engine == "torch" else self._watch_jax)(patch)

    def _begin(self) -> None:
        self.real, self.pieces = 0, 0

    def _count(self, real: int) -> None:
        self.real = (self.real or 0) + real
        self.pieces += 1

    def _watch_torch(self, patch: Patch) -> None:
        from dptrain.torch.clipping import ClippedGrad
        from dptrain.torch.guards import check_batch

        def change(true: Callable) -> Callable:
            def call(clipped: Any, batch: Any, mask: Any = None, into: Any = None, **how: Any) -> Any:
                if into is None:
                    self._begin()
                size, _ = check_batch(batch, mask)
                self._count(size if mask is None else int(mask.sum()))
                return true(clipped, batch, mask, into, **how)

            return call

        patch.around(ClippedGrad, "__call__", change)

    def _watch_jax(self, patch: Patch) -> None:
        from dptrain.jax.accumulate import Accumulator

        def zeros(true: Callable) -> Callable:
            def call(accumulator: Any, params: Any) -> Any:
                self._begin()
                return true(accumulator, params)

            return call

        def add(true: Callable) -> Callable:
            def call(accumulator: Any, total: Any, *args: Any, mask: Any) -> Any:
                self._count(int(mask.sum()))
                return true(accumulator, total, *args, mask=mask)

            return call

        patch.around(Accumulator, "zeros", zeros)
        patch.around(Accumulator, "add", add)
