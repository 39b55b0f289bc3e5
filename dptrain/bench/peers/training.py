"""What the adapters of PyTorch libraries have in common."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.bench.contestant import Contestant
from dptrain.bench.torch_task import Task

#: what Opacus, FastDP and private_vision add to the norm: ``min(1, C / (norm + 1e-6))``
STABILISER = 1e-6
NOISE_MULTIPLIER = 1.0


class Training(Protocol):
    """A model that a library trains."""

    def accumulate(self, batch: Any) -> None:
        """A physical step: the batch's clipped gradients are added to those before."""

    def release(self) -> None:
        """The rest of a logical step: noise, the optimizer, all gradients forgotten."""

    def clipped_sums(self) -> dict[str, Tensor | None]:
        """What has been accumulated, by parameter name; None for what the library leaves out."""


def contestant_of(name: str, task: Task, training: Callable[[float], Training]) -> Contestant:
    """A contestant, of a function that begins a training with a noise multiplier."""
    timed = training(NOISE_MULTIPLIER)

    def step() -> None:
        timed.accumulate(task.batch)
        task.synchronize()

    def end() -> None:
        timed.release()
        task.synchronize()

    def sums_of(n: int) -> dict[str, Tensor | None]:
        noiseless = training(0.0)
        noiseless.accumulate(first(task.batch, n))
        return noiseless.clipped_sums()

    def clipped_sum(n: int) -> dict[str, Tensor | None]:
        try:
            return sums_of(n)
        finally:  # engines and models refer to each other
            gc.collect()

    return Contestant(name, "case", step, end, clipped_sum, STABILISER)


def first(batch: Any, n: int) -> Any:
    """The first n examples of a batch."""
    return tree_map(lambda t: t[:n], batch)


def model_of(task: Task) -> nn.Module:
    """The task's model without activations in place, which hooks do not get on with."""
    model = task.model()
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return model


def averaging(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """The task's optimizer, to which a library gives noisy sums: it divides them by L before each step."""
    optimizer, size = task.optimizer(model), task.logical_batch_size

    def divide(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, size)

    optimizer.register_step_pre_hook(divide)
    return optimizer


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Without what a library prints as it goes."""
    return contextlib.redirect_stdout(io.StringIO())
