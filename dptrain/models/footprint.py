"""Whether a check of a model fits into memory, found before the model is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from dptrain.models.errors import ModelError


class _Room(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def room_bytes(self) -> int | None: ...


def require_room(name: str, make: Callable[[], nn.Module], room: _Room, advice: str) -> None:
    """Refuse a model whose check needs more than `room.room_bytes`. Raises ModelError."""
    if room.room_bytes is None:
        return
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in make().parameters())
    except Exception:  # what reads values while it is built has no shape without them
        return
    needed = check_bytes(count, room.batch_size)
    if needed > room.room_bytes:
        raise ModelError(
            f"{name} has {count / 1e9:.2f} billion parameters, whose check needs about "
            f"{needed / 1e9:.0f} GB, and {room.room_bytes / 1e9:.0f} GB are free; {advice}."
        )


def check_bytes(parameters: int, batch_size: int) -> int:
    """The model, and in float64: a copy, its sum, the judge's sum, a gradient, one per example."""
    return parameters * (4 + 8 * (4 + batch_size))
