"""`Mechanism`: making, reading, accounting, writing down, refusing."""

import json
import math
import pickle

import pytest

from dptrain import Mechanism
from dptrain.core.clip_rules import Automatic, GroupWise, PerLayer
from dptrain.core.spec import Sampling, StepSpec, flat_step

GOOD = {
    "noise_multiplier": 1.1,
    "clip_norm": 0.7,
    "sample_rate": 1 / 3,
    "steps": 12,
    "expected_batch_size": 33,
}


def constant(**changes):
    return Mechanism.constant(**{**GOOD, "delta": 1e-5, **changes})


def schedule():
    def run(sigma, clip_norm, steps):
        spec = flat_step(noise_multiplier=sigma, clip_norm=clip_norm, sample_rate=0.1, expected_batch_size=20)
        return spec, steps

    return Mechanism((run(2.0, 1.0, 3), run(1.0, 1.0, 4), run(1.0, 0.5, 5)), delta=1e-5)


def test_a_constant_mechanism_reads_as_it_was_made():
    mechanism = constant()
    assert (mechanism.steps, mechanism.noise_multiplier, mechanism.clip_norm) == (12, 1.1, 0.7)
    assert (mechanism.sample_rate, mechanism.expected_batch_size) == (1 / 3, 33.0)
    assert (mechanism.sampler, mechanism.delta) == ("poisson", 1e-5)
    assert mechanism.step(11).noise_stddev == 1.1 * 0.7
    assert mechanism.is_constant


def test_a_schedule_is_read_by_step():
    mechanism = schedule()
    assert mechanism.steps == 12
    sigmas = [mechanism.step(i).noise_multiplier for i in range(12)]
    assert sigmas == [2.0] * 3 + [1.0] * 9
    assert [mechanism.step(i).clip_norm for i in (6, 7)] == [1.0, 0.5]
    assert mechanism.sample_rate == 0.1  # what does not change can be read
    for name in ("noise_multiplier", "clip_norm"):
        with pytest.raises(ValueError, match=f"{name} changes"):
            getattr(mechanism, name)


def test_equal_runs_are_one():
    spec = constant().step(0)
    assert Mechanism(((spec, 5), (spec, 7)), delta=1e-5) == constant()


def test_steps_beyond_the_mechanism_are_refused():
    with pytest.raises(IndexError, match="budget is spent"):
        constant().step(12)
    with pytest.raises(ValueError, match="at most"):
        constant().epsilon(steps=13)
    with pytest.raises(ValueError, match="at least 0"):
        constant().epsilon(steps=-1)


def test_noise_is_scaled_by_the_sensitivity_of_the_rule():
    sampling = Sampling("poisson", 0.1)
    for rule, sensitivity in [
        (PerLayer((3.0, 4.0)), 5.0),
        (GroupWise((1.0, 1.0, 1.0, 1.0), ("a", "b", "c", "")), 2.0),
        (Automatic(1.5), 1.5),
    ]:
        assert StepSpec(rule, 2.0, sampling, 10).noise_stddev == pytest.approx(2 * sensitivity)
    with pytest.raises(ValueError, match="one threshold for each group"):
        _ = StepSpec(PerLayer((3.0, 4.0)), 2.0, sampling, 10).clip_norm


def test_epsilon_grows_with_steps_from_nothing():
    mechanism = schedule()
    curve = [mechanism.epsilon(steps=t, accountant="rdp") for t in range(13)]
    assert curve[0] == 0.0
    assert curve == sorted(curve)
    assert mechanism.epsilon() == mechanism.epsilon(steps=12)
    assert constant(noise_multiplier=0).epsilon() == math.inf


def test_epsilon_needs_a_delta():
    with pytest.raises(ValueError, match="no delta"):
        constant(delta=None).epsilon()
    assert constant(delta=None).epsilon(1e-5) == constant().epsilon()


def test_epsilon_so_far_is_an_upper_bound_and_exact_at_the_end():
    mechanism = constant(steps=40, sample_rate=0.1, noise_multiplier=3)
    so_far = [mechanism.epsilon_so_far(t, points=4) for t in range(41)]
    exact = [mechanism.epsilon(steps=t) for t in (0, 1, 7, 10, 23, 40)]
    assert all(so_far[t] >= e for t, e in zip((0, 1, 7, 10, 23, 40), exact, strict=True))
    assert so_far[0] == 0.0
    assert so_far[40] == exact[-1]
    assert so_far == sorted(so_far)


def test_epsilon_curve_ends_at_the_whole():
    mechanism = constant(steps=7, noise_multiplier=4)
    curve = mechanism.epsilon_curve(3)
    assert [t for t, _ in curve] == [3, 5, 7]
    assert curve[-1][1] == mechanism.epsilon()
    assert len(mechanism.epsilon_curve(100)) == 7
    assert [t for t, _ in mechanism.epsilon_curve([0, 2])] == [0, 2]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("epsilon", "q", "steps"), [(2, 0.2, 20), (0.5, 0.02, 100), (0.05, 1, 10)])
def test_calibration_meets_the_budget_and_wastes_little(epsilon, q, steps, accountant):
    given = {"sample_rate": q, "steps": steps, "clip_norm": 4.63, "expected_batch_size": 25_000}
    mechanism = Mechanism.calibrate(epsilon=epsilon, delta=1e-5, accountant=accountant, **given)
    assert 0.9998 * epsilon <= mechanism.epsilon(accountant=accountant) <= epsilon
    less = Mechanism.constant(noise_multiplier=mechanism.noise_multiplier * 0.999, delta=1e-5, **given)
    assert less.epsilon(accountant=accountant) > epsilon


def test_calibration_by_pld_needs_less_noise():
    given = {
        "epsilon": 0.5,
        "delta": 1e-5,
        "sample_rate": 0.05,
        "steps": 100,
        "clip_norm": 1,
        "expected_batch_size": 5,
    }
    by_pld, by_rdp = (Mechanism.calibrate(accountant=a, **given) for a in ("pld", "rdp"))
    assert by_pld.noise_multiplier < by_rdp.noise_multiplier


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_most_steps_within_a_budget(accountant):
    given = {
        "noise_multiplier": 4.0,
        "sample_rate": 0.1,
        "clip_norm": 1.0,
        "expected_batch_size": 5,
    }
    mechanism = Mechanism.calibrate_steps(epsilon=1, delta=1e-5, accountant=accountant, **given)
    one_more = Mechanism.constant(steps=mechanism.steps + 1, delta=1e-5, **given)
    assert mechanism.epsilon(accountant=accountant) <= 1
    assert one_more.epsilon(accountant=accountant) > 1


def test_impossible_budgets_are_refused():
    given = {"delta": 1e-5, "sample_rate": 0.5, "clip_norm": 1, "expected_batch_size": 10}
    with pytest.raises(ValueError, match="single step already"):
        Mechanism.calibrate_steps(epsilon=0.1, noise_multiplier=0.8, **given)
    with pytest.raises(ValueError, match="protects nobody"):
        Mechanism.calibrate(epsilon=1e6, steps=1, accountant="rdp", **given)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        Mechanism.calibrate(epsilon=0, steps=1, **given)


@pytest.mark.parametrize("mechanism", [constant(), schedule(), constant(delta=None)])
def test_round_trip_through_json_is_exact(mechanism):
    assert Mechanism.from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism


def test_every_clip_rule_and_sampler_round_trips():
    samplings = [
        Sampling("truncated-poisson", 0.1, 1000, 150),
        Sampling("shuffle-without-amplification", 1 / 7),
    ]
    for rule in (PerLayer((0.1, 0.3)), GroupWise((2.0,), ("",)), Automatic(0.7, 0.02)):
        for sampling in samplings:
            spec = StepSpec(rule, 1.3, sampling, 17)
            mechanism = Mechanism(((spec, 3),), "replace-special", 1e-6)
            assert Mechanism.from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("segments", 0),
        ("segments", 0, "step"),
        ("segments", 0, "step", "clip_rule"),
        ("segments", 0, "step", "sampling"),
    ],
)
def test_unknown_and_missing_keys_are_refused(path):
    for change in ("add", "remove"):
        data = constant().to_dict()
        inner = data
        for key in path:
            inner = inner[key]
        if change == "add":
            inner["surprise"] = 1
        else:
            inner.pop(sorted(inner)[0])
        with pytest.raises(ValueError, match=r"unknown|lacks"):
            Mechanism.from_dict(data)


def test_a_foreign_format_is_refused():
    with pytest.raises(ValueError, match="format 2"):
        Mechanism.from_dict({**constant().to_dict(), "format": 2})
    with pytest.raises(TypeError, match="dictionary"):
        Mechanism.from_dict([])


def test_it_is_frozen_hashable_and_picklable():
    mechanism = constant()
    with pytest.raises(AttributeError):
        mechanism.delta = 1e-3
    assert hash(mechanism) == hash(constant())
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample_rate": 0}, ValueError, "sample_rate must be above 0 and at most 1"),
        ({"sample_rate": 1.01}, ValueError, "sample_rate must be above 0 and at most 1"),
        ({"sample_rate": -0.1}, ValueError, "sample_rate"),
        ({"sample_rate": math.nan}, ValueError, "sample_rate must be finite"),
        ({"delta": 0}, ValueError, "delta must lie strictly between"),
        ({"delta": -1e-5}, ValueError, "delta"),
        ({"delta": 1}, ValueError, "delta"),
        ({"delta": math.inf}, ValueError, "delta must be finite"),
        ({"noise_multiplier": -1}, ValueError, "noise_multiplier must not be negative"),
        ({"noise_multiplier": math.inf}, ValueError, "noise_multiplier must be finite"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier must be a number"),
        ({"clip_norm": 0}, ValueError, "clip_norm must be above 0"),
        ({"clip_norm": -2}, ValueError, "clip_norm must be above 0"),
        ({"clip_norm": math.inf}, ValueError, "clip_norm must be finite"),
        ({"clip_norm": None}, TypeError, "clip_norm must be a number"),
        ({"expected_batch_size": 0}, ValueError, "expected_batch_size must be above 0"),
        ({"expected_batch_size": math.nan}, ValueError, "expected_batch_size must be finite"),
        ({"expected_batch_size": True}, TypeError, "expected_batch_size must be a number"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number"),
        ({"steps": True}, TypeError, "steps must be a whole number"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"sampler": "uniform"}, ValueError, "sampler 'uniform' is unknown"),
        ({"sampler": "shuffle"}, ValueError, "no privacy amplification"),
        ({"sampler": "fixed-size"}, ValueError, "needs dataset_size"),
        ({"dataset_size": 100}, ValueError, "does not use dataset_size"),
        ({"neighbours": "swap"}, ValueError, "neighbouring relation 'swap' is unknown"),
        (
            {"sampler": "fixed-size", "dataset_size": 100, "neighbours": "replace-one"},
            ValueError,
            "whole number",
        ),
        (
            {
                "sampler": "shuffle-without-amplification",
                "sample_rate": 0.3,
                "neighbours": "replace-one",
            },
            ValueError,
            "whole number",
        ),
    ],
)
def test_bad_quantities_give_one_clear_sentence(change, error, message):
    with pytest.raises(error, match=message) as caught:
        constant(**change)
    assert "\n" not in str(caught.value)


def test_an_empty_mechanism_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        Mechanism(())


def test_the_closing_table_names_every_quantity():
    described = constant().describe()
    text = " ".join(described)
    for quantity in (
        "epsilon",
        "delta",
        "relation",
        "unit",
        "accountant",
        "steps",
        "sampler",
        "rate q",
        "size L",
        "clip rule",
        "sensitivity",
        "sigma",
        "stddev",
    ):
        assert quantity in text
    assert described["steps"] == "12"
    assert all(isinstance(value, str) for value in described.values())
    assert schedule().describe()["noise multiplier sigma"] == "2, 1"
    assert constant(delta=None).describe()["delta"] == "not chosen"
