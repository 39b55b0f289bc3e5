"""Mechanisms that change over a run, and what they cost together."""

import math

import pytest

from dptrain.core.clip_rules import Automatic, Flat
from dptrain.core.mechanism import Mechanism
from dptrain.core.ramps import ramped
from dptrain.core.spec import Sampling, StepSpec, flat_step

FIRST = flat_step(noise_multiplier=1.0, clip_norm=0.8, sample_rate=0.01, expected_batch_size=50)


def test_a_ramp_begins_and_ends_where_it_says_and_keeps_the_number_of_steps():
    made = ramped(FIRST, 21, delta=1e-5, noise=0.5, clip=2.0, batch=4.0, pieces=4)
    assert made.steps == 21 and len(made.segments) == 4
    first, last = made.step(0), made.step(20)
    assert first == FIRST
    assert last.noise_multiplier == pytest.approx(0.5) and last.clip_norm == pytest.approx(1.6)
    assert last.sample_rate == pytest.approx(0.04) and last.expected_batch_size == pytest.approx(200)
    for spec, _ in made.segments:  # L / q is the size of the data set throughout
        assert spec.expected_batch_size / spec.sample_rate == pytest.approx(5000)
    assert made.expected_examples() == pytest.approx(sum(made.step(i).expected_batch_size for i in range(21)))


def test_a_calibrated_ramp_meets_its_budget_and_leaves_next_to_none():
    made = ramped(FIRST, 20, delta=1e-5, epsilon=2.0, noise=0.5, pieces=2, accountant="rdp")
    assert 2.0 * (1 - 2e-4) <= made.epsilon(accountant="rdp") <= 2.0
    assert Mechanism.from_dict(made.to_dict()) == made
    # Every piece costs: less noise at the end has to be paid for at the beginning.
    constant = Mechanism.calibrate(
        epsilon=2.0,
        delta=1e-5,
        sample_rate=0.01,
        steps=20,
        clip_norm=0.8,
        expected_batch_size=50,
        accountant="rdp",
    )
    assert made.step(0).noise_multiplier > constant.noise_multiplier > made.step(19).noise_multiplier


def test_few_steps_have_few_pieces():
    assert [count for _, count in ramped(FIRST, 3, delta=1e-5, noise=2.0).segments] == [1, 1, 1]
    assert ramped(FIRST, 1, delta=1e-5, noise=2.0).step(0) == FIRST


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        (FIRST, {"batch": 200.0}, "grow from 0.01 to 2"),
        (FIRST, {"noise": 0.0}, "noise"),
        (FIRST, {"clip": math.nan}, "clip"),
        (StepSpec(Automatic(1.0), 1.0, Sampling("poisson", 0.1), 10), {"clip": 2.0}, "automatic clipping"),
        (StepSpec(Flat(1.0), 1.0, Sampling("fixed-size", 0.1, 100), 10), {"noise": 2.0}, "Poisson"),
    ],
)
def test_what_cannot_change_is_refused(first, options, message):
    with pytest.raises(ValueError, match=message):
        ramped(first, 10, delta=1e-5, **options)
