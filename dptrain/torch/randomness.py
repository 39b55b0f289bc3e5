"""Which modules draw random numbers, so that a comparison of two runs can hold them still."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def drawing_modules(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, nn.Module], bool]:
    """(modules by name that draw while ``run`` runs, not counting what their children draw;
    whether anything outside of them drew)."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    stack: list[nn.Module] = []
    outside = False
    last = _state()

    def look(*_: Any) -> None:
        nonlocal last, outside
        now = _state()
        if not _equal(now, last):
            if stack:
                found[names[stack[-1]]] = stack[-1]
            else:
                outside = True
        last = now

    def enter(module: nn.Module, _: Any) -> None:
        look()
        stack.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        look()
        stack.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    look()
    return found, outside


def _state() -> list[Any]:
    numpy = np.random.get_state(legacy=False)["state"]
    states = [torch.get_rng_state(), random.getstate(), (numpy["pos"], numpy["key"].tobytes())]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def _equal(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(first, second))
