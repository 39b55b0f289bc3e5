"""ε against published values, an independent accountant and closed forms."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from dptrain.core import accounting
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import flat_step

REFERENCE = [
    # q, T, σ, ε by PLD, ε by RDP; δ = 1e-5, Poisson, add or remove one
    (0.5, 200, 8.0, 3.838, 4.157),
    (0.01, 10_000, 1.0, 6.188, 6.713),
    (5e-4, 100_000, 0.6, 2.969, 3.712),
]


def step(sigma=1.0, q=0.1, **sampling):
    return flat_step(
        noise_multiplier=sigma,
        clip_norm=1.0,
        sample_rate=q,
        expected_batch_size=10,
        **sampling,
    )


def gaussian_epsilon(sigma, delta):
    """The exact ε of one Gaussian of sensitivity 1 (Balle and Wang 2018)."""
    return dp_accounting.get_epsilon_gaussian(sigma, delta)


@pytest.mark.parametrize(("q", "steps", "sigma", "pld", "rdp"), REFERENCE)
def test_reference_values(q, steps, sigma, pld, rdp):
    segments = ((step(sigma, q), steps),)
    assert accounting.epsilon(segments, 1e-5) == pytest.approx(pld, abs=6e-4)
    assert accounting.epsilon(segments, 1e-5, accountant="rdp") == pytest.approx(rdp, abs=6e-4)


@pytest.mark.parametrize(("q", "steps", "sigma", "pld", "rdp"), REFERENCE[:2])
def test_an_independent_accountant_agrees_within_its_bounds(q, steps, sigma, pld, rdp):
    from prv_accountant.dpsgd import DPSGDAccountant

    prv = DPSGDAccountant(sigma, q, max_steps=steps, eps_error=0.05, delta_error=1e-9)
    lower, _, upper = prv.compute_epsilon(delta=1e-5, num_steps=steps)
    assert lower <= accounting.epsilon(((step(sigma, q), steps),), 1e-5) <= upper


def test_full_batches_are_plain_gaussians():
    # q = 1 and T steps are one Gaussian of σ/√T.
    computed = accounting.epsilon(((step(6.0, q=1.0), 9),), 1e-5)
    assert computed == pytest.approx(gaussian_epsilon(2.0, 1e-5), rel=1e-3)


def test_the_event_is_poisson_sampling_of_a_gaussian():
    event = accounting.event(((step(1.5, 0.2), 7),))
    assert event == dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.5)), 7
    )


def test_schedules_compose():
    first, second = (step(5.0, 0.1), 30), (step(4.0, 0.2), 20)
    together = accounting.epsilon((first, second), 1e-5)
    event = dp_accounting.ComposedDpEvent([accounting.event((first,)), accounting.event((second,))])
    assert together == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-5), rel=1e-9)
    assert together > max(accounting.epsilon((run,), 1e-5) for run in (first, second))
    rdp = accounting.epsilon((first, second), 1e-5, accountant="rdp")
    assert together <= rdp <= 1.3 * together


def test_rdp_matches_dp_accountings_own_composition():
    segments = ((step(1.1, 0.05), 400), (step(0.9, 0.02), 50))
    from dp_accounting.rdp import RdpAccountant

    theirs = RdpAccountant().compose(accounting.event(segments)).get_epsilon(1e-5)
    assert accounting.epsilon(segments, 1e-5, accountant="rdp") == pytest.approx(theirs, rel=1e-9)


def test_a_negative_divergence_never_counts_as_no_cost(monkeypatch):
    import numpy as np

    broken = np.full(len(accounting.RdpAccountant().orders), 0.5)
    broken[3] = -1e-12  # what cancellation leaves in one order
    monkeypatch.setattr(accounting, "_step_rdp", lambda step, neighbours: broken)
    assert accounting.epsilon(((step(1.2345), 3),), 1e-5, accountant="rdp") > 0


def test_no_noise_is_no_privacy_and_no_steps_cost_nothing():
    assert accounting.epsilon(((step(0.0), 1),), 1e-5) == math.inf
    assert accounting.epsilon(((step(1.0), 5), (step(0.0), 1)), 1e-5) == math.inf
    assert accounting.epsilon((), 1e-5) == 0.0


def test_replacing_costs_more_than_adding():
    segments = ((step(4.0, 0.1), 20),)
    adding = accounting.epsilon(segments, 1e-5)
    assert accounting.epsilon(segments, 1e-5, "replace-special") == pytest.approx(adding)
    assert accounting.epsilon(segments, 1e-5, "replace-one") > 1.2 * adding


def test_fixed_size_batches_pay_for_twice_the_clip_norm():
    # With q = 1 nothing is sampled, and replacing an example moves the sum by 2C.
    whole = step(8.0, 1.0, sampler="fixed-size", dataset_size=50)
    rdp = accounting.epsilon(((whole, 4),), 1e-5, "replace-one", "rdp")
    exact = gaussian_epsilon(8.0 / 2 / 2, 1e-5)  # 2C, and √4 steps
    assert exact <= rdp <= 1.2 * exact
    # PLD knows the relation itself: it must see the same mechanism.
    pld = accounting.epsilon(((step(8.0, 1.0), 4),), 1e-5, "replace-one")
    assert pld == pytest.approx(exact, rel=1e-3)


def test_fixed_size_batches_are_amplified():
    part = step(4.0, 0.1, sampler="fixed-size", dataset_size=50)
    whole = step(4.0, 1.0, sampler="fixed-size", dataset_size=50)
    cost = [accounting.epsilon(((s, 50),), 1e-5, "replace-one", "rdp") for s in (part, whole)]
    assert cost[0] < cost[1] / 2


def test_truncation_costs_little_where_it_is_rare_and_much_where_not():
    def cost(limit):
        spec = step(2.0, 0.1, sampler="truncated-poisson", dataset_size=100, max_batch_size=limit)
        return accounting.epsilon(((spec, 50),), 1e-5, "replace-special")

    untruncated = accounting.epsilon(((step(2.0, 0.1), 50),), 1e-5)
    assert cost(60) == pytest.approx(untruncated, rel=1e-3)
    assert cost(12) > 1.5 * untruncated


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (10, 1), (11, 2), (25, 3), (30, 3)])
def test_shuffling_is_not_amplified(steps, epochs):
    shuffled = step(3.0, 0.1, sampler="shuffle-without-amplification")
    exact = gaussian_epsilon(3.0 / math.sqrt(epochs), 1e-5)
    cost = accounting.epsilon(((shuffled, steps),), 1e-5, "replace-special")
    assert cost == pytest.approx(exact, rel=1e-3)
    replaced = accounting.epsilon(((shuffled, steps),), 1e-5, "replace-one")
    assert replaced == pytest.approx(gaussian_epsilon(1.5 / math.sqrt(epochs), 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("sampling", "neighbours", "accountant", "message"),
    [
        ({}, "replace-one", "rdp", "does not account"),
        ({}, "swap", "pld", "unknown"),
        ({}, "replace-one", "moments", "unknown"),
        ({"sampler": "fixed-size", "dataset_size": 100}, "add-or-remove-one", "rdp", "cannot"),
        ({"sampler": "fixed-size", "dataset_size": 100}, "replace-one", "pld", "does not account"),
        (
            {"sampler": "truncated-poisson", "dataset_size": 100, "max_batch_size": 20},
            "add-or-remove-one",
            "pld",
            "cannot",
        ),
        ({"sampler": "shuffle-without-amplification"}, "add-or-remove-one", "pld", "cannot"),
        ({"sampler": "shuffle-without-amplification"}, "replace-one", "rdp", "does not account"),
    ],
)
def test_what_cannot_be_accounted_is_refused(sampling, neighbours, accountant, message):
    with pytest.raises(ValueError, match=message):
        accounting.epsilon(((step(1.0, **sampling), 1),), 1e-5, neighbours, accountant)


def test_shuffling_in_a_schedule_is_refused():
    sampling = {"sampler": "shuffle-without-amplification"}
    segments = ((step(1.0, **sampling), 5), (step(2.0, **sampling), 5))
    with pytest.raises(ValueError, match="whole epochs"):
        accounting.event(segments, "replace-special")


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2, math.nan, math.inf])
def test_delta_must_be_a_probability(delta):
    with pytest.raises(ValueError, match="delta"):
        accounting.epsilon(((step(), 1),), delta)


def test_no_warnings_of_excluded_orders(capfd, caplog):
    accounting.epsilon(((step(8.0, 0.51), 3),), 1e-5, accountant="rdp")
    assert "Excluding" not in capfd.readouterr().err + caplog.text


def test_next_to_no_noise_is_accounted_in_no_memory_to_speak_of():
    """Its loss distribution would take petabytes."""
    found = [
        Mechanism.constant(
            noise_multiplier=sigma, clip_norm=1.0, sample_rate=0.1, steps=10, expected_batch_size=10
        ).epsilon(1e-5)
        for sigma in (1e-6, 1e-3, 0.02, 0.05, 0.2)
    ]
    assert found == sorted(found, reverse=True) and found[0] < float("inf") and found[-1] < 1000


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_noise_beyond_all_measure_is_accounted_as_much(accountant):
    spec = {"clip_norm": 1.0, "sample_rate": 0.25, "expected_batch_size": 8, "delta": 1e-5}
    mechanism = Mechanism.constant(**spec, noise_multiplier=1e300, steps=10)
    assert mechanism.epsilon(accountant=accountant) < 1e-6
