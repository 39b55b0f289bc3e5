"""Memory for per-example gradients that is used again at the next step.

On a CPU fresh memory costs more than the arithmetic: every page of it is faulted in and zeroed by the
system, at a few GB/s, and a batch of per-example gradients is given back and taken again at each
step. A GPU's allocator keeps what it had, so there nothing is held.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor


class Workspace:
    """Tensors by name; what they hold is overwritten by whoever takes them next."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """What is kept between steps."""
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def take(self, name: Hashable, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Memory of this shape, of the type and on the device of ``like``; None on an accelerator."""
        if like.device.type != "cpu":
            return None
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            self._held.pop(name, None)  # given back before more is taken
            held = self._held[name] = torch.empty(size, dtype=like.dtype)
        return held[:size].view(shape)
