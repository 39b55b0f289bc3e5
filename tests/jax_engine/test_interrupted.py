"""A loop of the user's own that is interrupted goes on, on its ledger."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain import Mechanism
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger

MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=6, expected_batch_size=20, delta=1e-5
)
DATA = np.random.default_rng(0).standard_normal((40, 4), np.float32)


def loss_fn(params, example):
    return jnp.sum((example @ params["w"]) ** 2)


def begin(ledger, key=None, params=None, taken=0):
    params = {"w": jnp.ones(4)} if params is None else params
    options = {"physical_batch_size": 8, "key": key, "ledger": ledger, "taken": taken}
    return dpj.make_private(loss_fn, params, optax.sgd(0.1, momentum=0.9), DATA, MECHANISM, **options)


def take(training, steps):
    taking = training.steps()
    for _ in range(steps):
        next(taking)
    return jax.tree.map(np.array, (training.params, training.optimizer_state)), training.taken


def test_lost_steps_are_paid_for(tmp_path):
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        training = begin(ledger)
        (params, _), taken = take(training, 2)
        take(training, 3)
    with Ledger.open(tmp_path / "ledger") as ledger:
        training = begin(ledger, params=params, taken=taken)
        assert len(list(training.steps())) == 1
    assert training.taken == 3
    assert training.epsilon == Ledger.read(tmp_path / "ledger").epsilon(1e-5) == MECHANISM.epsilon()


@pytest.mark.parametrize("differs", [False, True])
def test_with_a_key_they_are_repeated_if_they_are_the_same(tmp_path, differs):
    key = Key.from_seed(0)
    with Ledger.create(tmp_path / "whole", dataset="made up") as ledger:
        (whole, _), _ = take(begin(ledger, key), 6)
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        training = begin(ledger, key)
        (params, state), taken = take(training, 2)
        take(training, 3)
    with Ledger.open(tmp_path / "ledger") as ledger:
        training = begin(ledger, key, {"w": params["w"] + 1e-6 * differs}, taken)
        training.optimizer_state = jax.tree.map(jnp.array, state)
        list(training.steps())
        assert len(ledger.releases) == 6
    assert training.taken == (3 if differs else 6)
    assert differs or np.array_equal(training.params["w"], whole["w"])
