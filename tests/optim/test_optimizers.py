"""By each name both engines have the same optimizer, which goes on where it was saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dptrain.optim import OPTIMIZERS, build_optimizer, build_schedule
from dptrain.training.optimizer_state import optimizer_state, restore_optimizer

STEPS = 25
#: about as large as private ones
GRADIENTS = np.random.default_rng(0).normal(scale=0.01, size=(STEPS, 3, 2)).astype(np.float32)
#: of their noise, had they any
VARIANCES = np.where(np.arange(STEPS) < 10, 0.5e-4, 0.2e-4)
START = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)


class Torch:
    """A parameter on its way, under cosine learning rates and weight decay."""

    def __init__(self, name, lr=0.1, weight_decay=0.01):
        self.parameter = nn.Parameter(torch.tensor(START))
        self.optimizer = build_optimizer(name, [self.parameter], lr, weight_decay)
        self.schedule = build_schedule("cosine", self.optimizer, STEPS)

    def take(self, first=0, last=STEPS):
        for gradient, variance in zip(GRADIENTS[first:last], VARIANCES[first:last], strict=True):
            self.parameter.grad = torch.tensor(gradient)
            for group in self.optimizer.param_groups:
                group["noise_variance"] = variance
            self.optimizer.step()
            self.schedule.step()
        return self.parameter.detach().numpy().copy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_takes_the_same_steps(name):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from dptrain.optim.with_optax import build_optax

    optimizer = optax.with_extra_args_support(build_optax(name, 0.1, 0.01, "cosine", STEPS))

    @jax.jit
    def step(parameter, state, gradient, variance):
        updates, state = optimizer.update(gradient, state, parameter, noise_variance=variance)
        return optax.apply_updates(parameter, updates), state

    parameter = jax.numpy.asarray(START)
    state = optimizer.init(parameter)
    for gradient, variance in zip(GRADIENTS, VARIANCES, strict=True):
        parameter, state = step(parameter, state, gradient, variance)
    np.testing.assert_allclose(parameter, Torch(name).take(), atol=3e-5)


def in_words(name, gradients, lr):
    """The two momenta of the study, as their docstrings have them."""
    p, seen = START.astype(np.float64), []
    for t, g in enumerate(gradients, 1):
        seen.append(g)
        if name == "accumulated-momentum":
            p = p - lr * (g if t % 10 else g + np.mean(seen[-10:], axis=0))
        else:
            p = p - lr * (g / 2 + np.mean(seen, axis=0) / (2 * t))
    return p


@pytest.mark.parametrize("name", ["accumulated-momentum", "running-momentum"])
def test_the_momenta_are_what_they_say(name):
    ours = Torch(name, weight_decay=0.0)
    ours.schedule = build_schedule("constant", ours.optimizer, STEPS)
    np.testing.assert_allclose(ours.take(), in_words(name, GRADIENTS.astype(np.float64), 0.1), atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_one_goes_on_bit_for_bit(name):
    whole, first, second = Torch(name), Torch(name), Torch(name)
    first.take(last=13)
    restore_optimizer(second.optimizer, second.schedule, *optimizer_state(first.optimizer, first.schedule))
    second.parameter.data.copy_(first.parameter.data)
    np.testing.assert_array_equal(second.take(13), whole.take())
