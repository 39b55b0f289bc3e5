"""ε, σ or steps from the other two."""

import pytest

from dptrain.core.budget import solve

COMMON = {"delta": 1e-5, "sample_rate": 0.1, "accountant": "rdp"}


def test_the_three_answers_agree():
    sigma = solve(epsilon=2.0, steps=100, **COMMON)
    assert sigma.solved == "noise_multiplier"
    spent = solve(noise_multiplier=sigma.mechanism.noise_multiplier, steps=100, **COMMON)
    assert spent.solved == "epsilon"
    assert spent.epsilon == sigma.epsilon <= 2.0
    length = solve(epsilon=2.0, noise_multiplier=sigma.mechanism.noise_multiplier, **COMMON)
    assert length.solved == "steps"
    assert length.mechanism.steps == 100
    assert length.describe()["steps"] == "100"


def test_rate_and_length_from_sizes_and_epochs():
    answer = solve(
        noise_multiplier=1.0,
        epochs=2,
        expected_batch_size=25_000,
        dataset_size=50_000,
        delta=1e-5,
        accountant="rdp",
    )
    assert (answer.mechanism.sample_rate, answer.mechanism.steps) == (0.5, 4)
    assert answer.mechanism.expected_batch_size == 25_000
    assert answer.epochs == 2.0


@pytest.mark.parametrize(("epochs", "steps"), [(2, 20), (0.1, 1), (0.01, 1), (2.04, 20), (2.06, 21), (3, 30)])
def test_epochs_are_rounded_to_steps(epochs, steps):
    assert solve(noise_multiplier=1.0, epochs=epochs, **COMMON).mechanism.steps == steps


def test_expected_batch_size_follows_from_rate_and_size():
    answer = solve(noise_multiplier=1.0, steps=1, dataset_size=600, **COMMON)
    assert answer.mechanism.expected_batch_size == 60


def test_other_samplers():
    answer = solve(
        noise_multiplier=4.0,
        steps=3,
        dataset_size=100,
        sampler="fixed-size",
        neighbours="replace-one",
        **COMMON,
    )
    assert answer.mechanism.step(0).sampling.batch_size == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly two"),
        ({"epsilon": 1}, "exactly two"),
        ({"epsilon": 1, "noise_multiplier": 1, "steps": 3}, "exactly two"),
        ({"epsilon": 1, "steps": 3, "epochs": 1}, "not both"),
        ({"epsilon": 1, "steps": 3, "sample_rate": None}, "sample rate is not known"),
        (
            {"epsilon": 1, "steps": 3, "expected_batch_size": 30, "dataset_size": 100},
            "leave one of the three out",
        ),
        (
            {
                "epsilon": 1,
                "steps": 3,
                "sample_rate": None,
                "expected_batch_size": 30,
                "dataset_size": 20,
            },
            "at most 1",
        ),
        ({"noise_multiplier": 1, "epochs": 0}, "epochs must be above 0"),
    ],
)
def test_too_much_too_little_and_contradiction_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        solve(**{**COMMON, **given})
