"""The grid of hardened steps: data of the mechanism that cost nothing."""

import math

import pytest

from dptrain import Mechanism
from dptrain.core import rounded_gaussian
from dptrain.core.release import step_to_release
from dptrain.core.spec import StepSpec, flat_step

PLAIN = Mechanism.constant(
    noise_multiplier=1.1, clip_norm=0.7, sample_rate=0.01, steps=200, expected_batch_size=100, delta=1e-5
)


def step(sigma=1.0, clip_norm=1.0):
    return flat_step(noise_multiplier=sigma, clip_norm=clip_norm, sample_rate=0.1, expected_batch_size=9)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 1.99, 2.0, 700.0])
@pytest.mark.parametrize("clip_norm", [1e-12, 0.7, 1.0, 3e8])
def test_the_noise_has_some_sixteen_million_spacings(sigma, clip_norm):
    spec = Mechanism(((step(sigma, clip_norm), 1),)).hardened().step(0)
    assert math.frexp(spec.grid)[0] == 0.5
    assert 2**24 <= spec.noise_stddev / spec.grid < 2**25
    assert clip_norm / spec.grid <= 2**31


def test_with_little_noise_the_grid_is_as_fine_as_sums_allow():
    spec = Mechanism(((step(1e-4, 1.0), 1),)).hardened().step(0)
    assert 2**30 <= 1.0 / spec.grid <= 2**31 and spec.noise_stddev / spec.grid > 1e5


def test_a_schedule_has_one_grid():
    mechanism = Mechanism(((step(2.0), 3), (step(0.5), 4)), delta=1e-5).hardened()
    assert mechanism.grid == mechanism.step(0).grid == mechanism.step(6).grid == 2.0**-25
    with pytest.raises(ValueError, match=r"1 to 2\^32 grid spacings"):
        Mechanism(((step(500.0), 3), (step(0.5), 4))).hardened()


def test_it_is_the_same_mechanism_at_the_same_price():
    hardened = PLAIN.hardened()
    assert hardened != PLAIN and hardened.grid is not None and PLAIN.grid is None
    assert hardened.steps == PLAIN.steps and hardened.noise_multiplier == PLAIN.noise_multiplier
    for accountant in ("pld", "rdp"):
        assert hardened.epsilon(accountant=accountant) == PLAIN.epsilon(accountant=accountant)
    assert hardened.epsilon_so_far(7) == PLAIN.epsilon_so_far(7)
    assert hardened.hardened() == hardened
    assert "integer grid" in hardened.describe() and "integer grid" not in PLAIN.describe()


def test_the_samplers_error_counts_where_it_would_show(monkeypatch):
    assert math.isfinite(PLAIN.hardened().epsilon(delta=1e-9))
    monkeypatch.setattr(rounded_gaussian, "ERROR", 1e-20)
    from dptrain.core import accounting

    accounting.epsilon.cache_clear()
    try:
        assert PLAIN.hardened().epsilon() == math.inf  # 1e-5 has digits of 2e-21
        assert math.isfinite(PLAIN.epsilon())
    finally:
        accounting.epsilon.cache_clear()


def test_it_is_written_down_and_read_back():
    hardened = PLAIN.hardened()
    assert Mechanism.from_dict(hardened.to_dict()) == hardened
    data = PLAIN.to_dict()
    assert "grid" not in data["segments"][0]["step"]  # as it was written before there were grids
    assert Mechanism.from_dict(data) == PLAIN
    data["segments"][0]["step"]["grid"] = None
    assert Mechanism.from_dict(data) == PLAIN
    data["segments"][0]["step"]["grit"] = 1
    with pytest.raises(ValueError, match="unknown keys"):
        Mechanism.from_dict(data)


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (0.3, "power of two"),
        (0.0, "above 0"),
        (-0.5, "above 0"),
        (math.inf, "finite"),
        (2.0, "grid spacings"),  # coarser than the noise
        (2.0**-33, "grid spacings|overflow"),
        ("fine", "number"),
    ],
)
def test_grids_that_do_not_suit_are_refused(grid, problem):
    spec = step()
    with pytest.raises((TypeError, ValueError), match=problem):
        StepSpec(spec.clip_rule, spec.noise_multiplier, spec.sampling, spec.expected_batch_size, grid)


def test_sums_that_could_overflow_are_refused():
    spec = step(0.1)
    with pytest.raises(ValueError, match="overflow"):
        StepSpec(spec.clip_rule, 0.1, spec.sampling, 9, 2.0**-32)


def test_nothing_is_hardened_without_noise():
    with pytest.raises(ValueError, match="nothing to be hardened"):
        Mechanism(((step(0.0), 1),)).hardened()


def test_a_sum_is_released_on_its_own_grid_alone():
    hardened = PLAIN.hardened()
    assert step_to_release(hardened, 0.7, hardened.grid) == hardened.step(0)
    for mechanism, grid in ((hardened, None), (PLAIN, 2.0**-24), (hardened, 2.0**-20)):
        with pytest.raises(ValueError, match="the mechanism's grid"):
            step_to_release(mechanism, 0.7, grid)
