"""Adam without the bias of private noise: what it subtracts, how it learns of it, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain import torch as dpt
from dptrain.core.correlated import correlated
from dptrain.core.entropy import Key
from dptrain.core.spec import flat_step
from dptrain.optim import build_optimizer
from dptrain.optim.build import CORRECTED

SIZE, STEPS, CLIP_NORM = 40_000, 12, 2.0
REFUSED = re.escape("that of this one is not known")


class Noise:
    """Steps on sums of nothing, whose private gradients are noise."""

    def __init__(self, optimizer="adam-bc", **options):
        self.model = nn.Linear(SIZE, 1, bias=False)
        self.optimizer = build_optimizer(optimizer, self.model.parameters(), lr=0.0, **options)

    def gradient(self, step, sigma):
        """Noise of standard deviation sigma C / L in each coordinate."""
        spec = flat_step(
            noise_multiplier=sigma, clip_norm=CLIP_NORM, sample_rate=0.5, expected_batch_size=100.0
        )
        nothing = dpt.ClippedSum({"weight": torch.zeros(1, SIZE)}, torch.zeros(0), torch.zeros(0), CLIP_NORM)
        return dpt.privatize(nothing, spec, Key.from_seed(3).child("noise", step))

    def second_moment(self, sigmas):
        """That of the optimizer after so many steps, before the floor."""
        for step, sigma in enumerate(sigmas):
            dpt.apply(self.optimizer, self.model, self.gradient(step, sigma))
        return self.optimizer.state[self.model.weight]["exp_avg_sq"].numpy() / (1 - 0.999 ** len(sigmas))


@pytest.mark.parametrize(
    "sigmas", [[1.0] * STEPS, np.linspace(0.5, 3.0, STEPS).tolist()], ids=["constant", "rising"]
)
def test_of_noise_alone_the_second_moment_is_nothing(sigmas):
    """Also if the noise changes from step to step; of uncorrected Adam it is the noise's variance."""
    sigmas = [float(sigma) for sigma in sigmas]
    variances = (np.array(sigmas) * CLIP_NORM / 100.0) ** 2
    found = Noise().second_moment(sigmas)
    error = found.std() / np.sqrt(SIZE)
    assert abs(found.mean()) < 4 * error
    uncorrected = Noise("adam").second_moment(sigmas)
    assert uncorrected.mean() == pytest.approx(variances.mean(), rel=0.02)
    assert uncorrected.mean() > 50 * error


@pytest.mark.parametrize("name", CORRECTED)
def test_without_noise_it_is_adam(name):
    weights = []
    for each in (name, name.removesuffix("-bc")):
        parameter = nn.Parameter(torch.linspace(-1, 1, 8))
        optimizer = build_optimizer(each, [parameter], lr=0.1, weight_decay=0.1)
        for step in range(20):
            for group in optimizer.param_groups:
                group["noise_variance"] = 0.0
            parameter.grad = torch.sin(torch.arange(8.0) + step)
            optimizer.step()
        weights.append(parameter.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


def test_the_floor_is_in_units_of_the_noise():
    """The first corrected moment is negative wherever the noise came out small: the floor divides there."""
    noise = Noise(adam_floor=0.25)
    noise.optimizer.param_groups[0]["lr"] = 1.0
    before = noise.model.weight.detach().clone()
    gradient = noise.gradient(0, 1.0)
    g, variance = gradient.grads["weight"], (CLIP_NORM / 100.0) ** 2
    dpt.apply(noise.optimizer, noise.model, gradient)
    moved = before - noise.model.weight.detach()
    expected = g / (torch.clamp(g**2 - variance, min=0.25 * variance).sqrt() + 1e-8)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="the floor of the second moment is 0"):
        Noise(adam_floor=0.0)


@pytest.mark.parametrize("name", CORRECTED)
def test_a_gradient_of_unknown_noise_is_refused(name):
    noise = Noise(name)
    gradient = noise.gradient(0, 1.0)
    before = noise.model.weight.detach().clone()
    halved = gradient.map(lambda _, g: g / 2)
    with pytest.raises(ValueError, match=REFUSED):
        dpt.apply(noise.optimizer, noise.model, halved)
    dpt.apply(noise.optimizer, noise.model, gradient.map(lambda _, g: g / 2, gradient.noise_variance / 4))
    noise.model.weight.grad = torch.zeros_like(before)  # by hand, what the last gradient had is forgotten
    with pytest.raises(ValueError, match=REFUSED):
        noise.optimizer.step()


def test_noise_that_changes_with_the_steps_is_refused_before_any_is_released():
    mechanism = correlated(
        bands=2,
        steps=4,
        clip_norm=CLIP_NORM,
        sample_rate=0.5,
        expected_batch_size=4.0,
        delta=1e-3,
        noise_multiplier=1.0,
    )
    model = nn.Linear(2, 1)
    data = TensorDataset(torch.zeros(8, 2))
    optimizer = build_optimizer("adam-bc", model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="take one that need not"):
        dpt.make_private(model, optimizer, data, lambda m, x: m(x[0])[:, 0], mechanism)


def test_jax_is_told_and_refuses_alike():
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    from dptrain import jax as dpj
    from dptrain.optim.with_optax import build_optax

    params = jnp.zeros(6)
    nothing = dpj.ClippedSum(jnp.zeros(6), jnp.zeros(0), jnp.zeros(0), clip_norm=CLIP_NORM)
    spec = flat_step(noise_multiplier=1.0, clip_norm=CLIP_NORM, sample_rate=0.5, expected_batch_size=100.0)
    gradient = dpj.privatize(nothing, spec, Key.from_seed(3))
    assert gradient.noise_variance == spec.mean_noise_variance == (CLIP_NORM / 100.0) ** 2
    optimizer = dpj.private(build_optax("adam-bc", 1.0, 0.0, "constant", 1))
    state = optimizer.init(params)
    _, after = optimizer.update(gradient, state, params)
    g = np.asarray(gradient.grads)
    second = optax.tree_utils.tree_get(after, "nu")
    np.testing.assert_allclose(second, 0.001 * (g**2 - gradient.noise_variance), rtol=1e-4)
    with pytest.raises(ValueError, match=REFUSED):
        optimizer.update(gradient.map(lambda g: g / 2), state, params)
