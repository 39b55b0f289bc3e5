"""What our own optimizers for torch have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Directed(Optimizer):
    """p <- p - lr d, where a subclass says what d is. What it remembers lies in ``state``, as tensors.

    weight_decay: w; the gradient becomes g + w p, or, if `decoupled`, p becomes (1 - lr w) p beforehand.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        **options: Any,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "decoupled": decoupled, **options}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        state, gradient, decay = self.state[p], p.grad, group["weight_decay"]
        if "step" not in state:  # on the host and in float32, as torch's optimizers have it
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        if decay and group["decoupled"]:
            p.mul_(1 - group["lr"] * decay)
        elif decay:
            gradient = gradient.add(p, alpha=decay)
        p.add_(self.direction(gradient, state, int(state["step"]), group), alpha=-group["lr"])

    @abstractmethod
    def direction(self, gradient: Tensor, state: dict[str, Any], step: int, group: dict[str, Any]) -> Tensor:
        """d_t, like the gradient, which is not changed; step: t, from 1."""
