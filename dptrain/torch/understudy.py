"""A copy of the model on stand-in rows, on which the probe tries things out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .capture import Capture, ignore
from .errors import refusing
from .guards import check_buffers, check_losses, parameters_untouched, trainable
from .stand_ins import StandIns, random_state, randomised, seed

#: attributes that every module has
EVERY_MODULE_HAS = vars(nn.Module()).keys()


def _derived(model: nn.Module) -> dict[int, Any]:
    """For ``copy.deepcopy``: tensors computed from parameters, as the older weight_norm leaves on a
    module, which refuse to be copied with their graph; each forward pass makes them anew."""
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return {id(t): t.detach().clone() for t in held if t.grad_fn is not None}


def plain(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides parameters, buffers, submodules and hooks: caches, flags, counters."""
    own = vars(module)
    names = own.keys() - EVERY_MODULE_HAS
    return {name: own[name] for name in names if not name.startswith("__composable_api")}  # those are FSDP's


NO_COPY = "the model cannot be copied for probing ({}): keep what cannot be copied out of the module."


def _copied(value: Any) -> Any:
    """A copy of what a forward pass may change in place; the rest as it is."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


class Understudy:
    """Takes the model's place: its parameters are randomised, its buffers reset before each pass.

    Raises:
        Refused: the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batch: Any,
        mask: Tensor | None,
        batch_size: int,
    ):
        self.original, self.loss_fn = model, loss_fn
        with refusing(NO_COPY):
            self.model = self._double(model)
        self.model.zero_grad(set_to_none=True)
        self.stand_ins = StandIns(batch, mask, batch_size)
        self.parameters = self._trainable()
        #: the last error of the model's own, in a line
        self.failure = ""
        #: whether a forward pass drew random numbers
        self.random = False
        self._buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        self._attributes = [
            (module, {name: _copied(value) for name, value in plain(module).items()})
            for module in self.model.modules()
        ]

    def _double(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model, _derived(model))

    def _trainable(self) -> dict[str, Tensor]:
        """By name, as a forward pass sees them."""
        return trainable(self.model)

    def widen(self) -> bool:
        """To float64; False if it is no float32 model."""
        if any(p.dtype != torch.float32 for p in self.parameters.values()):
            return False
        self.model.double()
        self.stand_ins.widen()
        self._buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    attributes[name] = value.double()
        return True

    def everything(self) -> list[Tensor]:
        """All parameters as a forward pass sees them, frozen ones too."""
        return list(self.model.parameters())

    def randomise(self, attempt: int) -> None:
        """A zero-initialised head would hide what comes before it."""
        with torch.no_grad():
            for name, noise in randomised(self.model.named_parameters(), attempt):
                mine = self.model.get_parameter(name)
                own = self.original.get_parameter(name).nan_to_num()
                mine.copy_(own + noise.to(mine.device, mine.dtype))

    def parameter_digest(self) -> list[float]:
        """What changes with a parameter."""
        return [float(p.detach().double().sum()) for p in self.model.parameters()]

    def reset(self, draw: int = 0) -> None:
        """Buffers, attributes and randomness as at the start; ``draw`` picks the random numbers."""
        for module, attributes in self._attributes:
            for name in plain(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update({name: _copied(value) for name, value in attributes.items()})
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):  # else a graph may still need it as it is
                buffer.copy_(self._buffers[name])
        seed(7 + draw)

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers as they are now."""
        return {n: b.clone() for n, b in self.model.named_buffers()}

    def losses(self, rows: Any, layouts: Any, draw: int = 0, carry: bool = False) -> Tensor:
        """The losses of a captured forward pass, detached; ``carry``: without a reset before it."""
        size = len(next(t for t in tree_leaves(rows) if isinstance(t, Tensor)))
        if carry:
            seed(7 + draw)
        else:
            self.reset(draw)
        before = random_state(self.parameters)
        losses = self._forward(rows, size, layouts)[1].detach()
        self.random |= random_state(self.parameters) != before
        return losses

    def forward(self, rows: Any, size: int, layouts: Any, draw: int = 0) -> tuple[Capture, Tensor]:
        """A captured forward pass; the losses ``[size]``."""
        self.reset(draw)
        return self._forward(rows, size, layouts)

    def _forward(self, rows: Any, size: int, layouts: Any) -> tuple[Capture, Tensor]:
        capture = Capture(self.parameters, size, ignore, layouts, self.everything())
        batch = tree_map(lambda t: capture.mark_data(t.clone()) if isinstance(t, Tensor) else t, rows)
        with parameters_untouched(self.everything()), torch.enable_grad(), capture:
            losses = self.loss_fn(self.model, batch)
        check_losses(losses, size)
        check_buffers(self.model, capture)
        return capture, losses
