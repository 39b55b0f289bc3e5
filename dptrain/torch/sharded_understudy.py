"""The probe's understudy of a model under FSDP2, which refuses copies: the model itself, put back afterwards.

Its shards are set aside and randomised, its buffers and attributes are replaced by copies. So the probe takes
one share of the parameters more and never a whole model. All ranks probe together, on the same rows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .errors import refusing
from .fsdp import Sharding
from .shards import local
from .stand_ins import randomised
from .understudy import NO_COPY, Understudy, plain


class ShardedUnderstudy(Understudy):
    """Made by ``standing_in``."""

    def __init__(self, sharding: Sharding, loss_fn, batch: Any, mask: Tensor | None, batch_size: int):
        self.sharding = sharding
        sharding.recover()
        self._shards = dict(sharding.model.named_parameters())
        self._own = {name: local(p.detach()).clone() for name, p in self._shards.items()}
        super().__init__(sharding.model, loss_fn, batch, mask, batch_size)

    def _double(self, model: nn.Module) -> nn.Module:
        return model

    def _trainable(self) -> dict[str, Tensor]:
        return self.sharding.full

    def everything(self) -> list[Tensor]:
        return self.sharding.everything

    def widen(self) -> bool:
        return False

    def parameter_digest(self) -> list[float]:
        return []  # what is written to a gathered parameter is gone when it is freed

    @torch.no_grad()
    def randomise(self, attempt: int) -> None:
        """The same values on any number of ranks."""
        self.sharding.recover()
        for name, noise in randomised(self._shards.items(), attempt):
            mine = local(self._shards[name])
            mine.copy_(self._own[name].nan_to_num() + self.sharding.rows(noise).to(mine.device, mine.dtype))

    @torch.no_grad()
    def put_back(self) -> None:
        """The parameters as they were."""
        self.sharding.recover()
        for name, own in self._own.items():
            local(self._shards[name]).copy_(own)

    def reset(self, draw: int = 0) -> None:
        self.sharding.recover()
        super().reset(draw)

    def _forward(self, rows: Any, size: int, layouts: Any) -> tuple[Capture, Tensor]:
        self.sharding.recover()
        return super()._forward(rows, size, layouts)


@contextlib.contextmanager
def standing_in(
    sharding: Sharding,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
) -> Iterator[ShardedUnderstudy]:
    """The model as its own understudy; afterwards it is as it was, to the bit.

    Raises:
        Refused: what its modules hold cannot be copied.
    """
    model = sharding.model
    gradients = [(p, p.grad) for p in model.parameters()]
    held = [(module, plain(module), dict(module._buffers)) for module in model.modules()]
    kept = [*model.modules(), *model.parameters(), *sharding.everything]
    memo: dict[int, Any] = {id(item): item for item in kept}
    with refusing(NO_COPY):
        copies = [copy.deepcopy((attributes, buffers), memo) for _, attributes, buffers in held]
    try:
        for (module, _, _), (attributes, buffers) in zip(held, copies):
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        understudy = ShardedUnderstudy(sharding, loss_fn, batch, mask, batch_size)
        try:
            yield understudy
        finally:
            understudy.put_back()
    finally:
        for module, attributes, buffers in held:
            for name in plain(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        for p, gradient in gradients:
            p.grad = gradient
