"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn, optim

from dptrain.optim.momenta import AccumulatedMomentum, RunningMomentum

MOMENTUM = 0.9
DECAY = 0.99
"""Of the mean square of RMSProp's gradients."""

_FUSED = ("cpu", "cuda")  # devices

Maker = Callable[..., torch.optim.Optimizer]


def _unfused(make: Maker) -> Maker:
    """For optimizers that have no fused form."""
    return lambda parameters, fused=None, **options: make(parameters, **options)


OPTIMIZERS: dict[str, Maker] = {
    "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=MOMENTUM),
    "nesterov": partial(optim.SGD, momentum=MOMENTUM, nesterov=True),
    "adagrad": optim.Adagrad,
    "rmsprop": _unfused(partial(optim.RMSprop, alpha=DECAY)),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "accumulated-momentum": _unfused(AccumulatedMomentum),
    "running-momentum": _unfused(RunningMomentum),
}
"""By name, as torch has them but for the last two: `momenta`."""


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    shared: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """The optimizer called `name`, over the parameters that require gradients.

    momentum, nesterov: SGD with momentum 0.9. weight_decay: as torch applies it (decoupled in adamw). shared:
    ranks of which each keeps the state of some parameters, updates those and sends them to the others
    (ZeRO-1).

    On CPUs and CUDA devices it is torch's fused one, where there is one, which passes over memory once: on
    two CPU cores AdamW takes a fraction of the time (`results/cpu-noise.json`). `dptrain.torch.apply` gives
    it gradients in the parameters' own layout, which the fused SGD for CPUs relies on.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}.")
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in _FUSED for p in chosen)
    options = {"lr": lr, "weight_decay": weight_decay, "fused": fused or None}
    if shared is None:
        return OPTIMIZERS[name](chosen, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(chosen, OPTIMIZERS[name], process_group=shared, **options)
