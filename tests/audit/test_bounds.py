"""Bounds hold as often as they say, and are not far below what is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dptrain.audit.bounds import (
    Evidence,
    Guesses,
    epsilon_of_rates,
    error_rates,
    guesses,
    one_run_epsilon,
    one_run_p_value,
    shares,
    upper_limit,
)
from dptrain.audit.figure import least_false_negatives
from dptrain.audit.profile import Noises, Profile, profile_of, scaled
from dptrain.core.mechanism import Mechanism


def gaussian(mu: float, m: int, seed: int) -> Evidence:
    """What a mechanism of Gaussian differential privacy μ shows of m canaries."""
    rng = np.random.default_rng(seed)
    present = rng.random(m) < 0.5
    return Evidence("all", rng.standard_normal(m) + mu * present, present)


def randomized_response(epsilon: float, m: int, seed: int) -> Evidence:
    """Each coin by itself, told with its worst probability."""
    rng = np.random.default_rng(seed)
    present = rng.random(m) < 0.5
    truth = rng.random(m) < 1 / (1 + math.exp(-epsilon))
    return Evidence("all", np.where(truth == present, 1.0, 0.0), present)


def one_step(sigma: float) -> Mechanism:
    return Mechanism.constant(
        noise_multiplier=sigma, clip_norm=1, sample_rate=1, steps=1, expected_batch_size=1, delta=1e-5
    )


def test_the_upper_limit_is_that_of_clopper_and_pearson():
    for k, n in ((0, 10), (3, 10), (9, 10), (200, 1000)):
        exact = stats.binomtest(k, n, alternative="less").proportion_ci(0.99, method="exact").high
        assert upper_limit(k, n, 0.01) == pytest.approx(exact)
    assert upper_limit(10, 10, 0.01) == 1


def test_significance_is_shared_out_whole():
    for n in (1, 2, 7):
        assert sum(shares(0.05, n)) == pytest.approx(0.05)


def test_error_rates_are_above_the_true_ones_as_often_as_they_say():
    """At a significance of 20 %; the union bound leaves some of it unused, so that fewer are wrong."""
    mu, wrong = 1.0, 0
    true = least_false_negatives
    profile = profile_of(one_step(1.0))
    for seed in range(200):
        rates = error_rates(gaussian(mu, 400, seed), 0.2)
        wrong += bool(np.any(rates[:, 1] < true(profile, rates[:, 0]) - 1e-3))
    assert wrong <= 52  # P[Binomial(200, 0.2) > 52] = 2 %


def test_scores_that_are_all_alike_say_nothing():
    present = np.arange(100) % 2 == 0
    for scores in (np.zeros(100), np.full(100, np.nan)):
        rates = error_rates(Evidence("all", scores, present), 0.05)
        assert epsilon_of_rates(rates, 1e-5) == 0
    assert epsilon_of_rates(error_rates(Evidence("all", np.zeros(9), np.ones(9, bool)), 0.05), 0.0) == 0


def test_scores_that_tell_all_are_bounded_by_their_number():
    present = np.arange(2000) % 2 == 0
    found = Evidence("all", np.where(present, np.nan, 0.0), present)
    epsilon = epsilon_of_rates(error_rates(found, 0.05), 1e-5)
    assert 4 < epsilon < math.log(1000 / -math.log(0.05))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_the_profile_of_one_gaussian_step_is_the_formula(sigma):
    """Dong, Roth and Su 2019, corollary 2.13."""
    profile, mu = profile_of(one_step(sigma)), 1 / sigma
    e = profile.epsilons
    exact = stats.norm.cdf(-e / mu + mu / 2) - np.exp(e) * stats.norm.cdf(-e / mu - mu / 2)
    assert np.all(profile.deltas >= exact - 1e-12) and np.allclose(profile.deltas, exact, atol=1e-5)
    for y in (1e-6, 1e-3, 0.2, 0.7, 0.99):
        true = stats.norm.cdf(stats.norm.ppf(y) - mu)
        assert true * 0.93 <= profile.least(y) <= true + 1e-12


def test_the_noise_is_found_within_a_few_percent():
    noises, mu = Noises(one_step(1.0)), 1.0
    rates = error_rates(gaussian(mu, 100_000, 0), 0.05)
    scale, epsilon = noises.bound(lambda profile: profile.refuted_by(rates), 1e-5)
    assert 1 < scale < 1.07
    true = one_step(1.0).epsilon(1e-5)
    assert 0.9 * true < epsilon < true
    assert epsilon_of_rates(rates, 1e-5) < epsilon


def test_nothing_is_said_where_nothing_is_refuted():
    assert Noises(one_step(1.0)).bound(lambda profile: False, 1e-5) == (math.inf, 0.0)
    scale, epsilon = Noises(one_step(1.0)).bound(lambda profile: True, 1e-5)
    assert scale < 0.35 and epsilon > 15


def test_steinkes_p_value_is_that_of_their_program():
    """Its two nested sums, for small numbers."""
    for m, r, v, epsilon, delta in ((100, 20, 18, 1.0, 1e-3), (50, 50, 30, 0.0, 1e-4), (30, 9, 9, 2.0, 0.0)):
        q = 1 / (1 + math.exp(-epsilon))
        beta, alpha, total = stats.binom.sf(v - 1, r, q), 0.0, 0.0
        for i in range(1, v + 1):
            total += stats.binom.pmf(v - i, r, q)
            alpha = max(alpha, total / i)
        expected = min(beta + alpha * delta * 2 * m, 1)
        assert one_run_p_value(Guesses(m, r, v), epsilon, delta) == pytest.approx(expected)


def test_one_run_bounds_hold_for_randomized_response_and_come_close():
    """Which has the worst case of ε-differential privacy, canary by canary."""
    epsilon, m = 2.0, 4000
    pure = Profile(np.array([epsilon]), np.array([0.0]))
    found = [guesses(randomized_response(epsilon, m, seed))[-1] for seed in range(60)]
    wrong = sum(one_run_epsilon(g, 0.0, 0.1) > epsilon for g in found)
    refuted = sum(pure.refuted_by_guesses(g, 0.1) for g in found)
    assert wrong <= 14 and refuted <= 14  # P[Binomial(60, 0.1) > 14] = 0.1 %
    assert min(one_run_epsilon(g, 0.0, 0.05) for g in found) > 1.2
    less = Profile(np.array([1.2]), np.array([0.0]))
    assert all(less.refuted_by_guesses(g, 0.05) for g in found)


def test_the_recursion_is_that_of_another_implementation():
    auditing = pytest.importorskip("jax_privacy.auditing")
    for significance, made in ((0.05, Guesses(1000, 200, 170)), (1e-3, Guesses(5000, 512, 460))):
        theirs = auditing._epsilon_one_run_fdp(0, made.canaries, made.made, made.correct, significance, 1e-5)
        noises = Noises(one_step(1.0))
        _, ours = noises.bound(lambda p, g=made, s=significance: p.refuted_by_guesses(g, s), 1e-5)
        assert ours == pytest.approx(theirs, rel=0.03)
        other = auditing._epsilon_one_run(0, made.canaries, made.made, made.correct, significance, 1e-7)
        assert one_run_epsilon(made, 1e-7, significance) == pytest.approx(other, abs=2e-4)


def test_guesses_are_the_extremes():
    present = np.array([False, False, True, True, True, False, True, True])
    made = guesses(Evidence("all", np.arange(8.0), present))
    assert made == [Guesses(8, 2, 2), Guesses(8, 8, 5)]


def test_scaling_changes_the_noise_alone():
    stated = one_step(2.0)
    assert scaled(stated, 0.5).noise_multiplier == 1.0
    assert scaled(scaled(stated, 0.5), 2.0) == stated
