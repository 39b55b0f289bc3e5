"""The simulation of many devices: its limits, and the paper's numbers."""

from dataclasses import replace

import pytest

from dptrain.bench import simulation
from dptrain.bench.simulation import Network, Reduction, Step, Training

NETWORK = Network(4, intra_node_bandwidth=100e9, inter_node_bandwidth=10e9, inter_node_latency_s=1e-5)
STEP = Step(physical_batch=10, physical_step_s=0.5, end_s=0.2)
TRAINING = Training(STEP, Reduction(4e8), logical_batch=1000)


def test_one_device_takes_what_was_measured():
    assert simulation.all_reduce_s(TRAINING.reduction, NETWORK, 1) == 0
    assert simulation.logical_step_s(TRAINING, NETWORK, 1) == pytest.approx(100 * 0.5 + 0.2)
    assert simulation.efficiency(TRAINING, NETWORK, 1) == 1


def test_a_ring_sends_all_but_one_share_twice():
    within = simulation.all_reduce_s(Reduction(4e8), NETWORK, 4)
    assert within == pytest.approx(2 * 3 / 4 * 4e8 / 100e9)
    across = simulation.all_reduce_s(Reduction(4e8, messages=3), NETWORK, 8)
    assert across == pytest.approx(2 * 7 / 8 * 4e8 / 10e9 + 3 * 2 * 7 * 1e-5)


def test_a_fast_network_leaves_only_the_end_of_the_step():
    instant = Network(4, 1e30, 1e30)
    assert simulation.logical_step_s(TRAINING, instant, 100) == pytest.approx(0.5 + 0.2)
    without_end = replace(TRAINING, step=replace(STEP, end_s=0.0))
    assert simulation.efficiency(without_end, instant, 100) == pytest.approx(1)


def test_reducing_every_physical_batch_costs_as_many_reductions():
    often = replace(TRAINING, reduction=Reduction(4e8, every="physical"))
    once_s, often_s = (simulation.logical_step_s(t, NETWORK, 8) for t in (TRAINING, often))
    one_s = simulation.all_reduce_s(Reduction(4e8), NETWORK, 8)
    # 125 examples on each device are 13 physical batches
    assert often_s - once_s == pytest.approx(12 * one_s)


def test_what_is_behind_the_backward_pass_is_free():
    hidden = replace(TRAINING, reduction=Reduction(4e8, overlap=1.0))
    assert simulation.logical_step_s(hidden, NETWORK, 8) == pytest.approx(125 / 10 * 0.5 + 0.2)
    waiting = simulation.logical_step_s(TRAINING, NETWORK, 8) - simulation.logical_step_s(hidden, NETWORK, 8)
    assert waiting == pytest.approx(simulation.all_reduce_s(Reduction(4e8), NETWORK, 8))
    slow = replace(NETWORK, inter_node_bandwidth=1e8)
    shown = simulation.logical_step_s(TRAINING, slow, 8) - simulation.logical_step_s(hidden, slow, 8)
    assert shown == pytest.approx(2 / 3 * (125 / 10 * 0.5) / 13)


def test_more_bandwidth_is_never_slower_and_more_waiting_never_faster():
    rates = [
        simulation.examples_per_s(TRAINING, replace(NETWORK, inter_node_bandwidth=b), 16)
        for b in (1e7, 1e8, 1e9, 1e10)
    ]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    spread = [simulation.efficiency(replace(TRAINING, spread=s), NETWORK, 16) for s in (1.0, 1.05, 1.2)]
    assert spread == sorted(spread, reverse=True) and spread[0] > spread[-1]
    shares = [simulation.efficiency(TRAINING, NETWORK, n) for n in (1, 8, 16, 64, 256)]
    assert shares == sorted(shares, reverse=True)


def test_the_device_that_drew_most_is_waited_for():
    assert simulation.largest_share(800, 8, None) == 100
    assert simulation.largest_share(100, 1, 0.5) == 100
    assert simulation.largest_share(800, 8, 1.0) == 100  # all examples: nothing is drawn
    # The largest of 80 normal numbers is expected 2.43 deviations above their mean (tables).
    assert (simulation.largest_share(8000, 80, 0.75) - 100) / 5 == pytest.approx(2.43, abs=0.02)


def test_the_fitted_bandwidth_gives_the_efficiency_back():
    fitted = simulation.fit_inter_node_bandwidth(TRAINING, NETWORK, 16, 0.6)
    assert simulation.efficiency(TRAINING, fitted, 16) == pytest.approx(0.6)
    assert fitted.intra_node_bandwidth == NETWORK.intra_node_bandwidth


def test_what_no_bandwidth_explains_is_refused():
    with pytest.raises(ValueError, match="no bandwidth gives"):
        simulation.fit_inter_node_bandwidth(replace(TRAINING, spread=2.0), NETWORK, 16, 0.6)
    with pytest.raises(ValueError, match="in one node"):
        simulation.fit_inter_node_bandwidth(TRAINING, NETWORK, 4, 0.6)
    with pytest.raises(ValueError, match="at least one"):
        simulation.all_reduce_s(TRAINING.reduction, NETWORK, 0)


def test_amdahl_finds_the_fraction_that_made_the_numbers():
    devices = [1, 4, 16, 80]
    made = [31.0 * simulation.amdahl_speedup(0.97, n) for n in devices]
    assert simulation.amdahl_fit(devices, made) == pytest.approx(0.97, abs=1e-5)
    with pytest.raises(ValueError, match="two different"):
        simulation.amdahl_fit([4, 4], [1.0, 1.0])


def test_the_papers_shares_of_ideal_are_its_parallel_fractions():
    """53.3 % and 69.2 % of ideal on 80 GPUs; 98.9 % and 99.5 % (section 6.2)."""
    assert simulation.amdahl_fit([1, 80], [1, 80 * 0.533]) == pytest.approx(0.989, abs=5e-4)
    assert simulation.amdahl_fit([1, 80], [1, 80 * 0.692]) == pytest.approx(0.995, abs=1e-3)
    # A serial part that is the same in every logical step has the shape of Amdahl's law.
    once = Training(Step(216, 2.0, 0.05), Reduction(3.5e8), 25_000)
    fitted = simulation.fit_inter_node_bandwidth(once, NETWORK, 80, 0.533)
    devices = (1, 4, 8, 16, 32, 80)
    rates = [x for _, x in simulation.curve(once, fitted, devices)]
    assert simulation.amdahl_fit(devices, rates) == pytest.approx(0.989, abs=1e-3)
