"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn, optim

from dptrain.optim.adam_bc import FLOOR, AdamBC
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
    "adam-bc": _unfused(AdamBC),
    "adamw-bc": _unfused(partial(AdamBC, decoupled=True)),
    "accumulated-momentum": _unfused(AccumulatedMomentum),
    "running-momentum": _unfused(RunningMomentum),
}
"""By name: torch's, and ours of `adam_bc` and `momenta`."""
CORRECTED = ("adam-bc", "adamw-bc")
"""Those that must know the noise of each gradient."""


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    shared: dist.ProcessGroup | None = None,
    adam_floor: float = FLOOR,
) -> torch.optim.Optimizer:
    """The optimizer called `name`, over the parameters that require gradients.

    momentum, nesterov: SGD with momentum 0.9. weight_decay: as torch applies it (decoupled in adamw and
    adamw-bc). shared:
    ranks of which each keeps the state of some parameters, updates those and sends them to the others
    (ZeRO-1). adam_floor: of adam-bc and adamw-bc, see there.

    On CPUs and CUDA devices it is torch's fused one, where there is one, which passes over memory once: on
    two CPU cores AdamW takes a fraction of the time (`results/cpu-noise.json`). `dptrain.torch.apply` gives
    it gradients in the parameters' own layout, which the fused SGD for CPUs relies on.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}.")
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    fused = all(p.is_floating_point() and p.device.type in _FUSED for p in chosen)
    options = {"lr": lr, "weight_decay": weight_decay, "fused": fused or None}
    if name in CORRECTED:
        options["floor"] = adam_floor
    if shared is None:
        return OPTIMIZERS[name](chosen, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(chosen, OPTIMIZERS[name], process_group=shared, **options)
