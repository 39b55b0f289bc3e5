"""What an entry of the zoo is, and what is done to a model before it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dptrain.bench.exactness import silence, wake

LossFn = Callable[[nn.Module, Any], Tensor]
#: nothing is left out that any of this many examples uses
PROBES = 16


@dataclass(frozen=True)
class Case:
    """A model with a loss ``[B]`` and batches for it, in float64."""

    model: nn.Module
    loss_fn: LossFn
    make_batch: Callable[[int], Any]
    #: ``loss_fn`` runs under ``Wide``
    wide: bool = False


@dataclass(frozen=True)
class Entry:
    """One model of the zoo; ``make`` builds it, and nothing heavy is imported before."""

    name: str
    family: str
    make: Callable[[], Case]
    batch_norm: bool = False
    #: another reason why no private gradient exists (examples mix, data stays in buffers)
    refuse: str = ""
    #: the model casts to float32 inside; see ``Wide``
    wide: bool = False
    slow: bool = False

    @property
    def refusable(self) -> bool:
        return self.batch_norm or bool(self.refuse)

    def build(self, seed: int = 0) -> Case:
        """The case with random weights, nothing random in its forward pass, in training mode."""
        torch.manual_seed(seed)
        case = self.make()
        if self.wide:
            case = dataclasses.replace(case, loss_fn=widened(case.loss_fn), wide=True)
        case.model.double().train()
        silence(case.model)
        wake(case.model)
        if not self.refusable:
            freeze_unused(case)
        return case


def freeze_unused(case: Case) -> None:
    """Freeze what no example uses, as every engine asks of its users."""
    case.loss_fn(case.model, case.make_batch(PROBES)).sum().backward()
    for parameter in case.model.parameters():
        if parameter.grad is None or not parameter.grad.any():
            parameter.requires_grad_(False)
    case.model.zero_grad(set_to_none=True)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Wide(TorchFunctionMode):
    """Casts to float32 become casts to float64.

    Models that cast down to float32 inside lose the precision that exactness is judged with.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def widened(loss_fn: LossFn) -> LossFn:
    def wide_loss(model, batch):
        with Wide():
            return loss_fn(model, batch)

    return wide_loss
