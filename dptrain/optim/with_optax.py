"""Optimizers of optax by the same names, doing what torch's do."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from dptrain.optim.build import MOMENTUM
from dptrain.optim.schedule import SCHEDULES


def build_optax(
    name: str, lr: float, weight_decay: float, schedule: str, steps: int
) -> optax.GradientTransformation:
    """The optimizer called ``name``, with its learning rate over the run.

    momentum: SGD with momentum 0.9. weight_decay: as torch applies it, to the gradient, or decoupled in
    adamw.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"There is no schedule {schedule!r}; choose from {', '.join(SCHEDULES)}.")
    rates = jnp.asarray([lr * SCHEDULES[schedule](step / steps) for step in range(steps)])

    def rate(step: jnp.ndarray) -> jnp.ndarray:
        return rates[jnp.minimum(step, steps - 1)]

    made = {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum=MOMENTUM),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=weight_decay),
    }
    if name not in made:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(made)}.")
    if weight_decay and name != "adamw":
        return optax.chain(optax.add_decayed_weights(weight_decay), made[name]())
    return made[name]()
