"""DiSK: where gradients are taken, what the filter makes of them, and that neither costs privacy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain import torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import flat_step

KAPPA, CLIP_NORM, LR = 0.4, 0.5, 0.3
MECHANISM = flat_step(noise_multiplier=0.7, clip_norm=CLIP_NORM, sample_rate=0.5, expected_batch_size=8.0)


def losses(model, batch):
    inputs, targets = batch
    return (model(inputs)[:, 0] - targets) ** 2


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.fixture
def batch():
    random = np.random.default_rng(1)
    return torch.tensor(random.normal(size=(8, 3)), dtype=torch.float32), torch.tensor(
        3 * random.normal(size=8), dtype=torch.float32
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Training:
    """SGD with a filter, a step at a time."""

    def __init__(self, model, batch, kappa=KAPPA):
        self.model, self.batch = model, batch
        self.denoiser = dpt.Denoiser(model, kappa)
        self.clipped = dpt.clipped_grad(model, losses, clip_norm=CLIP_NORM, method="per-example")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step(self, number):
        """Where its gradient was taken, and the private gradient there."""
        with self.denoiser.ahead():
            point, clipped = weights(self.model), self.clipped(self.batch)
        gradient = dpt.privatize(clipped, MECHANISM, Key.from_seed(5).child("noise", number))
        dpt.apply(self.optimizer, self.model, self.denoiser.filtered(gradient))
        return point, gradient


def test_it_is_the_published_recursion(net, batch):
    training = Training(net, batch)
    before, now, estimate = weights(net), weights(net), None
    for number in range(6):
        point, gradient = training.step(number)
        for name, x in now.items():
            y = x + (1 - KAPPA) / KAPPA * (x - before[name])
            torch.testing.assert_close(point[name], y, rtol=1e-5, atol=1e-6)
        measured = gradient.grads
        estimate = (
            measured
            if estimate is None
            else {name: (1 - KAPPA) * estimate[name] + KAPPA * g for name, g in measured.items()}
        )
        before, now = now, {name: x - LR * estimate[name] for name, x in now.items()}
        for name, x in weights(net).items():
            torch.testing.assert_close(x, now[name], rtol=1e-5, atol=1e-6)


def test_a_gain_of_one_is_the_optimizer_alone(net, batch):
    training, start = Training(net, batch, kappa=1.0), weights(net)
    for number in range(3):
        training.step(number)
    found = weights(net)
    net.load_state_dict(start)
    for number in range(3):
        gradient = dpt.privatize(training.clipped(batch), MECHANISM, Key.from_seed(5).child("noise", number))
        dpt.apply(training.optimizer, net, gradient)
    for name, p in weights(net).items():
        torch.testing.assert_close(found[name], p, rtol=1e-6, atol=1e-7)


def test_neighbours_differ_by_at_most_the_clip_norm_where_gradients_are_taken(net, batch):
    """Each example's gradient is clipped at the look-ahead point, not at the weights and moved there."""
    training = Training(net, batch)
    for number in range(3):
        training.step(number)
    here = weights(net)
    with training.denoiser.ahead():
        assert not equal(weights(net), here)
        everyone = training.clipped(batch)
        rows = torch.arange(8)
        for absent in range(8):
            others = training.clipped(batch, rows != absent)
            move = [(everyone.grads[name] - g).flatten() for name, g in others.grads.items()]
            assert float(torch.linalg.vector_norm(torch.cat(move))) <= CLIP_NORM * (1 + 1e-5)
        assert float(everyone.norms.min()) > CLIP_NORM  # all of them are clipped there


def test_the_noise_of_an_estimate_is_known():
    """Over many coordinates it has the variance that is told to optimizers, at every step."""
    model = nn.Linear(50_000, 1, bias=False)
    denoiser = dpt.Denoiser(model, KAPPA)
    nothing = dpt.ClippedSum({"weight": torch.zeros(1, 50_000)}, torch.zeros(0), torch.zeros(0), CLIP_NORM)
    measured = []
    for step in range(6):
        with denoiser.ahead():
            pass
        private = dpt.privatize(nothing, MECHANISM, Key.from_seed(5).child("noise", step))
        measured.append(private.noise_variance)
        estimate = denoiser.filtered(private)
        assert float(estimate.grads["weight"].var()) == pytest.approx(estimate.noise_variance, rel=0.04)
    assert estimate.noise_variance < 0.3 * measured[-1]
    with denoiser.ahead():
        pass
    assert denoiser.filtered(private.map(lambda _, g: g)).noise_variance is None


def test_weights_are_put_back_bit_for_bit_also_after_an_error(net, batch):
    training = Training(net, batch)
    training.step(0)
    training.step(1)
    here, kept = weights(net), training.denoiser.state_dict()
    with pytest.raises(KeyboardInterrupt), training.denoiser.ahead():
        assert not equal(weights(net), here)
        raise KeyboardInterrupt
    assert equal(weights(net), here) and training.denoiser.state_dict()["previous"] is kept["previous"]


def test_it_goes_on_bit_for_bit_from_a_saved_state(net, batch):
    training = Training(net, batch)
    for number in range(2):
        training.step(number)
    saved, kept = (
        weights(net),
        {
            key: {n: t.clone() for n, t in value.items()} if isinstance(value, dict) else value
            for key, value in training.denoiser.state_dict().items()
        },
    )
    for number in range(2, 4):
        training.step(number)
    whole = weights(net)
    net.load_state_dict(saved)
    again = Training(net, batch)
    again.denoiser.load_state_dict(kept)
    for number in range(2, 4):
        again.step(number)
    assert equal(weights(net), whole)
    with pytest.raises(ValueError, match="of another model"):
        dpt.Denoiser(nn.Linear(2, 2), KAPPA).load_state_dict(kept)


def test_a_gradient_that_was_taken_elsewhere_is_refused(net, batch):
    training = Training(net, batch)
    gradient = dpt.privatize(training.clipped(batch), MECHANISM, Key.from_seed(1))
    with pytest.raises(RuntimeError, match="taken at its look-ahead point"):
        training.denoiser.filtered(gradient)
    with pytest.raises(TypeError, match="given ClippedSum"):
        training.denoiser.filtered(training.clipped(batch))


def test_make_private_takes_it(net, batch):
    """It filters every step; a filter of another model is refused."""
    start, found = weights(net), []
    for kappa in (None, 1.0, KAPPA):
        net.load_state_dict(start)
        training = dpt.make_private(
            net,
            torch.optim.SGD(net.parameters(), lr=LR),
            TensorDataset(batch[0].repeat(2, 1), batch[1].repeat(2)),
            losses,
            Mechanism(((MECHANISM, 4),)),
            physical_batch_size=4,
            method="per-example",
            key=Key.from_seed(7),
            denoiser=None if kappa is None else dpt.Denoiser(net, kappa),
        )
        for _ in training.steps():
            pass
        found.append(torch.cat([p.flatten() for p in weights(net).values()]))
    plain, unfiltered, filtered = found
    torch.testing.assert_close(unfiltered, plain, rtol=1e-5, atol=1e-6)
    assert float((filtered - plain).abs().max()) > 1e-3
    assert training.denoiser.taken == 4
    with pytest.raises(ValueError, match="the Denoiser is of another model"):
        dpt.Denoiser(nn.Linear(2, 2), KAPPA).check(net)


@pytest.mark.parametrize("kappa", [0.0, -0.1, 1.1, float("nan")])
def test_a_gain_out_of_range_is_refused(net, kappa):
    with pytest.raises(ValueError, match="the gain of the denoising filter"):
        dpt.Denoiser(net, kappa)
