"""Correlated noise: what it is, what it costs, and how far one example moves it."""

import math

import numpy as np
import pytest

from dptrain.core.accounting import recorded
from dptrain.core.clip_rules import Flat, Quantile
from dptrain.core.correlated import correlated, prefix_error, square_root
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.release import check_dataset_size
from dptrain.core.sampling import LogicalSampler
from dptrain.core.spec import Sampling, StepSpec, flat_step

CYCLE = Sampling("cyclic-poisson", 0.05, cycle=8)


def made(**changes) -> Mechanism:
    options = {"bands": 8, "steps": 40, "clip_norm": 1.0, "sample_rate": 0.05, "expected_batch_size": 50.0}
    return correlated(**(options | {"delta": 1e-5, "noise_multiplier": 2.0} | changes))


def matrix(coefficients, steps: int) -> np.ndarray:
    out = np.zeros((steps, steps))
    for j, c in enumerate(coefficients):
        out += np.diag(np.full(steps - j, c), -j)
    return out


def test_coefficients_are_those_of_the_square_root_of_prefix_sums():
    whole = square_root(6)
    assert math.fsum(c * c for c in whole) == pytest.approx(1, abs=1e-15)
    root = matrix([c / whole[0] for c in whole], 6)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((6, 6))), rtol=1e-14)
    assert square_root(1) == (1.0,)


def test_the_error_of_prefix_sums_is_that_of_the_matrices_and_falls_with_the_bands():
    for bands, steps in ((1, 9), (4, 30), (30, 30)):
        c = matrix(square_root(bands), steps)
        want = np.linalg.norm(np.tril(np.ones((steps, steps))) @ np.linalg.inv(c)) / math.sqrt(steps)
        assert prefix_error(square_root(bands), steps) == pytest.approx(want, rel=1e-12)
    assert prefix_error((1.0,), 9) == pytest.approx(math.sqrt(5))
    errors = [prefix_error(square_root(b), 100) for b in (1, 2, 8, 32)]
    assert errors == sorted(errors, reverse=True)


def test_an_example_moves_what_is_released_by_the_root_of_its_turns():
    """C times the difference of all clipped sums, with a full gradient, of any direction, at every turn."""
    rng, steps = np.random.default_rng(0), 40
    c = matrix(square_root(8), steps)
    for group in range(8):
        moved = np.zeros((steps, 5))
        turns = range(group, steps, 8)
        for t in turns:
            direction = rng.normal(size=5)
            moved[t] = direction / np.linalg.norm(direction)
        assert np.linalg.norm(c @ moved) <= math.sqrt(len(turns)) * (1 + 1e-12)
        blocks = [np.linalg.norm((c @ moved)[t : t + 8]) for t in turns]
        assert max(blocks) <= 1 + 1e-12


def test_it_costs_as_many_releases_as_an_example_has_turns():
    whole = made()
    plain = flat_step(noise_multiplier=2.0, clip_norm=1.0, sample_rate=0.4, expected_batch_size=50)
    for steps, turns in ((1, 1), (8, 1), (9, 2), (40, 5)):
        assert whole.epsilon(steps=steps) == Mechanism(((plain, turns),), delta=1e-5).epsilon()
    assert made(noise_multiplier=None, epsilon=3.0).epsilon() == pytest.approx(3.0, rel=2e-4)
    assert Mechanism.from_dict(whole.to_dict()) == whole
    assert "8 steps" in whole.describe()["noise"]
    check_dataset_size(whole, 1000)
    spec = whole.step(0)  # lost in the second cycle: both draws of it are paid for
    assert sum(n for _, n in recorded((i, spec) for i in (*range(10), *range(9, 12)))) == 24


def test_turns_are_a_cycle_apart_and_drawn_at_the_stated_rate():
    sampler = LogicalSampler(4000, CYCLE, Key.from_seed(3))
    seen: dict[int, list[int]] = {}
    sizes = []
    for step in range(160):
        drawn = sampler.sample(step)
        assert len(np.unique(drawn)) == len(drawn)
        sizes.append(len(drawn))
        for index in drawn:
            seen.setdefault(int(index), []).append(step)
    for steps in seen.values():
        assert len({step % 8 for step in steps}) == 1
    # 160 steps of 200 expected: Binomial, its standard deviation over the groups' sizes included
    assert np.mean(sizes) == pytest.approx(200, abs=6 * math.sqrt(200 / 160))
    counts = np.bincount([len(steps) for steps in seen.values()], minlength=21)
    assert (counts * np.arange(len(counts))).sum() / 4000 / 20 == pytest.approx(0.4, abs=0.01)
    groups = np.bincount([steps[0] % 8 for steps in seen.values()], minlength=8)
    assert ((groups - 500) ** 2 / 500).sum() < 40  # chi-squared of 7 degrees: 1e-6


def test_groups_are_of_the_key_and_of_nothing_else():
    some = LogicalSampler(1000, CYCLE, Key.from_seed(1))
    more = LogicalSampler(100_000, CYCLE, Key.from_seed(1))
    other = LogicalSampler(1000, CYCLE, Key.from_seed(2))
    indices = np.arange(1000)
    assert (some._group_of(indices, 8) == more._group_of(indices, 8)).all()
    assert (some._group_of(indices, 8) == other._group_of(indices, 8)).mean() < 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepSpec(Flat(1.0), 1.0, Sampling("poisson", 0.1), 5, correlation=(0.8, 0.6)), "2 bands"),
        (lambda: StepSpec(Flat(1.0), 1.0, CYCLE, 5, correlation=(1.0, 0.1)), "add up to more than 1"),
        (lambda: StepSpec(Flat(1.0), 1.0, CYCLE, 5, correlation=(-0.5,)), "positive number"),
        (lambda: StepSpec(Quantile(1.0, 9.0), 1.0, CYCLE, 5, correlation=(1.0,)), "fixed clip norm"),
        (lambda: StepSpec(Flat(1.0), 1.0, CYCLE, 5, correlation=9 * (0.1,)), "9 bands"),
        (lambda: Sampling("cyclic-poisson", 0.2, cycle=8), "shorter cycle"),
        (lambda: Sampling("cyclic-poisson", 0.2), "needs cycle"),
        (lambda: Sampling("poisson", 0.2, cycle=2), "does not use cycle"),
        (lambda: made(epsilon=1.0), "one of epsilon"),
        (
            lambda: Mechanism(((made().step(0), 3), (made(noise_multiplier=1.0).step(0), 3))),
            "keep every quantity",
        ),
    ],
)
def test_what_would_not_be_covered_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
