"""Optimizers of optax by the same names, doing what torch's do."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from dptrain.optim.adam_bc import FLOOR
from dptrain.optim.adam_bc_with_optax import scale_by_adam_bc
from dptrain.optim.build import DECAY, MOMENTUM
from dptrain.optim.momenta_with_optax import scale_by_accumulated_momentum, scale_by_running_momentum
from dptrain.optim.schedule import SCHEDULES

DECOUPLED = ("adamw", "adamw-bc")
"""Weight decay is not part of the gradient."""


def build_optax(
    name: str, lr: float, weight_decay: float, schedule: str, steps: int, adam_floor: float = FLOOR
) -> optax.GradientTransformation:
    """The optimizer called ``name``, with its learning rate over the run.

    momentum, nesterov: SGD with momentum 0.9. weight_decay: as torch applies it, to the gradient, or
    decoupled in adamw and adamw-bc. adam_floor: of adam-bc and adamw-bc, see there.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"There is no schedule {schedule!r}; choose from {', '.join(SCHEDULES)}.")
    rates = jnp.asarray([lr * SCHEDULES[schedule](step / steps) for step in range(steps)])

    def rate(step: jnp.ndarray) -> jnp.ndarray:
        return rates[jnp.minimum(step, steps - 1)]

    def down(*directions: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(*directions, optax.scale_by_learning_rate(rate))

    decay = optax.add_decayed_weights(weight_decay)
    made = {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum=MOMENTUM),
        "nesterov": lambda: optax.sgd(rate, momentum=MOMENTUM, nesterov=True),
        # torch begins at zero, and divides by sqrt(sum) + 1e-10: optax's constant is below the root.
        "adagrad": lambda: down(optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20)),
        "rmsprop": lambda: optax.rmsprop(rate, decay=DECAY, eps_in_sqrt=False),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=weight_decay),
        "adam-bc": lambda: down(scale_by_adam_bc(adam_floor)),
        "adamw-bc": lambda: down(scale_by_adam_bc(adam_floor), decay),
        "accumulated-momentum": lambda: down(scale_by_accumulated_momentum()),
        "running-momentum": lambda: down(scale_by_running_momentum()),
    }
    if name not in made:
        raise ValueError(f"There is no optimizer {name!r}; choose from {', '.join(made)}.")
    if weight_decay and name not in DECOUPLED:
        return optax.chain(decay, made[name]())
    return made[name]()
