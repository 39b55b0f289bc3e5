"""A clip norm that follows a quantile: what both releases cost together, and how far examples move them."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from dptrain.core.clip_rules import Flat, Quantile
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.quantile import FollowedClipNorm
from dptrain.core.release import step_to_release
from dptrain.core.spec import Sampling, StepSpec

RULE = Quantile(1.0, count_noise=5.0, quantile=0.7, learning_rate=0.3)


def step(sigma=1.0, rule=RULE, batch_size=100.0) -> StepSpec:
    return StepSpec(rule, sigma, Sampling("poisson", 0.1), batch_size)


def epsilon(*events: dp_accounting.DpEvent) -> float:
    return PLDAccountant().compose(dp_accounting.ComposedDpEvent(list(events))).get_epsilon(1e-5)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
def test_the_sum_and_the_count_together_cost_what_the_step_states(sigma):
    """Without sampling, by the accountant: a sum of sensitivity C with z_g C, a count of 1/2 with its own."""
    alone = step(sigma).at(2.0).noise_multiplier
    assert alone > sigma and step(1e-300).at(2.0).noise_multiplier == 1e-300
    both = epsilon(
        dp_accounting.GaussianDpEvent(alone), dp_accounting.GaussianDpEvent(RULE.count_noise / 0.5)
    )
    assert both == pytest.approx(epsilon(dp_accounting.GaussianDpEvent(sigma)), rel=1e-3)


def test_one_example_moves_the_count_by_a_half():
    follow = FollowedClipNorm(RULE)
    rng = np.random.default_rng(0)
    for extra in (0.0, 0.5, 1.0, 1.5, 1e30, math.inf, math.nan):
        norms = rng.exponential(size=20)
        moved = follow.centred(np.append(norms, extra)) - follow.centred(norms)
        assert abs(moved) == 0.5
    assert follow.centred(np.zeros(0)) == 0.0


def test_the_clip_norm_finds_the_quantile():
    follow, rng = FollowedClipNorm(Quantile(100.0, 5.0, 0.7)), np.random.default_rng(1)
    found = []
    for index in range(200):
        norms = rng.exponential(size=rng.binomial(1000, 0.1))
        follow.clip_norm = follow.moved(follow.centred(norms), step(), Key.from_seed(0).child("noise", index))
        found.append(follow.clip_norm)
    assert np.median(found[50:]) == pytest.approx(-math.log(0.3), rel=0.1)


def test_the_noise_on_the_count_is_that_which_is_accounted():
    shares = []
    for index in range(4000):
        follow = FollowedClipNorm(Quantile(1.0, 5.0, 0.5, learning_rate=1.0))
        follow.clip_norm = follow.moved(10.0, step(), Key.from_seed(index))
        shares.append(0.5 - math.log(follow.clip_norm))
    assert np.mean(shares) == pytest.approx(0.6, abs=5 * 0.05 / 4000**0.5)  # 1/2 + 10/L
    assert np.std(shares) == pytest.approx(0.05, rel=5 / (2 * 4000) ** 0.5)  # 5/L; 5 % off is seen


def test_a_step_is_released_at_the_clip_norm_it_has_and_accounted_as_a_whole():
    spec = step()
    now = spec.at(3.0)
    assert now.clip_rule == Flat(3.0) and now.noise_stddev == pytest.approx(3.0 * (1 - 0.01) ** -0.5)
    assert step_to_release(now, 3.0) == now
    with pytest.raises(ValueError, match="follows a quantile"):
        step_to_release(spec, 1.0)
    with pytest.raises(ValueError, match="keeps its clip norm"):
        now.at(1.0)
    made = Mechanism(((spec, 10),), delta=1e-5)
    assert Mechanism.from_dict(made.to_dict()) == made
    plain = Mechanism(((step(rule=Flat(1.0)), 10),), delta=1e-5)
    assert made.epsilon() == plain.epsilon()
    assert "examples" in made.describe()["noise on the count"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: step(rule=Quantile(1.0, 0.5)), "takes more than 0.5"),
        (lambda: Quantile(1.0, 0.0), "count_noise"),
        (lambda: Quantile(1.0, 1.0, quantile=1.5), "quantile"),
        (lambda: Mechanism(((step(), 2),)).hardened(), "hardened steps have a fixed clip norm"),
        (lambda: FollowedClipNorm(RULE, -1.0), "clip_norm"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
