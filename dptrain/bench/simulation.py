"""Throughput on many devices, from what one device and the network do.

Data-parallel training: each of N devices computes the gradients of its part of the logical batch; now and
then all reduce their gradients to the sum. A ring of N devices reduces S bytes in 2 (N - 1) turns, in each of
which every device sends S / N bytes to its neighbour (Patarasuk and Yuan, Bandwidth optimal all-reduce
algorithms for clusters of workstations, J. Parallel Distrib. Comput. 69, 2009):

    2 (N - 1) / N * S / bandwidth + 2 (N - 1) * latency

A ring over several nodes is as fast as its slowest link. All functions are pure; times are in seconds, sizes
in bytes, rates per second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar


@dataclass(frozen=True)
class Step:
    """What a logical step is made of on one device, as measured.

    Attributes:
        physical_batch: largest number of examples that are computed at once.
        physical_step_s: forward, backward and clipping of so many.
        end_s: the end of a logical step: noise and optimizer.
        backward_share: part of `physical_step_s` that is the backward pass; 2/3 where nothing else is known,
            for it computes two gradients where the forward pass computes one output.
    """

    physical_batch: int
    physical_step_s: float
    end_s: float = 0.0
    backward_share: float = 2 / 3


@dataclass(frozen=True)
class Reduction:
    """When and how gradients are summed over devices.

    Attributes:
        gradient_bytes: of all parameters that are trained.
        every: after each physical batch, or once in a logical step.
        messages: in how many pieces; each pays the latency.
        overlap: part of the backward pass behind which a reduction can hide, from 0 to 1.
    """

    gradient_bytes: float
    every: Literal["physical", "logical"] = "logical"
    messages: int = 1
    overlap: float = 0.0


@dataclass(frozen=True)
class Network:
    """Links between devices: bytes per second in one direction, and seconds until the first byte is there."""

    devices_per_node: int
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    intra_node_latency_s: float = 0.0
    inter_node_latency_s: float = 0.0

    def slowest_link(self, devices: int) -> tuple[float, float]:
        """``(bandwidth, latency)`` of the link that paces a ring of so many devices."""
        if devices <= self.devices_per_node:
            return self.intra_node_bandwidth, self.intra_node_latency_s
        return self.inter_node_bandwidth, self.inter_node_latency_s


@dataclass(frozen=True)
class Training:
    """Data-parallel training of one kind.

    Attributes:
        logical_batch: expected number of examples in a logical step, on all devices together.
        spread: time of the slowest device over that of the one measured; all wait for it.
        sample_rate: where every device draws its own examples independently, the probability of each: some
            device then has more than its share. None: all have the same number.
    """

    step: Step
    reduction: Reduction
    logical_batch: float
    spread: float = 1.0
    sample_rate: float | None = None


def all_reduce_s(reduction: Reduction, network: Network, devices: int) -> float:
    """Seconds for one reduction of all gradients by a ring, if nothing hides it; 0 on one device.

    Raises ValueError for less than one device.
    """
    if devices < 1:
        raise ValueError(f"there are {devices} devices; there must be at least one.")
    if devices == 1:
        return 0.0
    bandwidth, latency_s = network.slowest_link(devices)
    sent = 2 * (devices - 1) / devices * reduction.gradient_bytes
    return sent / bandwidth + 2 * (devices - 1) * latency_s * reduction.messages


def largest_share(logical_batch: float, devices: int, sample_rate: float | None) -> float:
    """Expected number of examples of the device that has most.

    With independent Poisson sampling a device has a binomial number of examples. The largest of N normal
    numbers is expected at the quantile (N - 0.375) / (N + 0.25) (Blom, Statistical Estimates and Transformed
    Beta-Variables, 1958).
    """
    mean = logical_batch / devices
    if sample_rate is None or devices == 1:
        return mean
    deviation = math.sqrt(mean * (1 - sample_rate))
    return mean + deviation * NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))


def logical_step_s(training: Training, network: Network, devices: int) -> float:
    """Seconds for a logical step on so many devices.

    A device's examples are divided into the fewest physical batches of equal size. A reduction takes
    what of it does not hide behind the backward pass of the physical batch that it follows.
    """
    step, reduction = training.step, training.reduction
    examples = largest_share(training.logical_batch, devices, training.sample_rate)
    physical_steps = max(1, math.ceil(examples / step.physical_batch - 1e-9))
    spread = training.spread if devices > 1 else 1.0
    compute_s = spread * examples / step.physical_batch * step.physical_step_s
    hidden_s = reduction.overlap * step.backward_share * compute_s / physical_steps
    waiting_s = max(0.0, all_reduce_s(reduction, network, devices) - hidden_s)
    reductions = physical_steps if reduction.every == "physical" else 1
    return compute_s + reductions * waiting_s + step.end_s


def examples_per_s(training: Training, network: Network, devices: int) -> float:
    """Throughput of all devices together."""
    return training.logical_batch / logical_step_s(training, network, devices)


def efficiency(training: Training, network: Network, devices: int) -> float:
    """Throughput over that of one device times the number of devices, from 0 to 1."""
    return examples_per_s(training, network, devices) / (devices * examples_per_s(training, network, 1))


def curve(training: Training, network: Network, devices: Sequence[int]) -> list[tuple[int, float]]:
    """``(devices, examples per second)`` for each number of devices."""
    return [(n, examples_per_s(training, network, n)) for n in devices]


def fit_inter_node_bandwidth(
    training: Training, network: Network, devices: int, measured_efficiency: float
) -> Network:
    """The network with the one bandwidth between nodes at which an efficiency comes out as measured.

    It is an effective one, in bytes/s: whatever else made devices wait for each other is in it.

    Raises:
        ValueError: no bandwidth from 1 kB/s to 1 EB/s explains it, or all devices are in one node.
    """
    if devices <= network.devices_per_node:
        raise ValueError(f"{devices} devices are in one node: no bandwidth between nodes can be seen there.")

    def off(log_bandwidth: float) -> float:
        return efficiency(training, with_bandwidth(log_bandwidth), devices) - measured_efficiency

    def with_bandwidth(log_bandwidth: float) -> Network:
        return dataclasses.replace(network, inter_node_bandwidth=math.exp(log_bandwidth))

    low, high = math.log(1e3), math.log(1e18)
    if off(low) * off(high) > 0:
        raise ValueError(
            f"no bandwidth gives an efficiency of {measured_efficiency:.3g} on {devices} devices: it is "
            f"{off(high) + measured_efficiency:.3g} even without any time for reductions."
        )
    return with_bandwidth(brentq(off, low, high, xtol=1e-12))


def amdahl_speedup(parallel_fraction: float, devices: float) -> float:
    """Amdahl's law (AFIPS 1967): 1 / ((1 - p) + p / N)."""
    return 1 / ((1 - parallel_fraction) + parallel_fraction / devices)


def amdahl_fit(devices: Sequence[int], throughput: Sequence[float]) -> float:
    """The parallel fraction, from 0 to 1, that explains throughputs best (least squares).

    The throughput of one device is fitted with it, so that no single measurement weighs more than the others.

    Raises:
        ValueError: throughputs on fewer than two different numbers of devices.
    """
    if len(devices) != len(throughput) or len(set(devices)) < 2:
        raise ValueError(
            "Amdahl's law is fitted to throughputs on at least two different numbers of devices."
        )
    measured = np.asarray(throughput, dtype=float)

    def squares(fraction: float) -> float:
        speedup = np.array([amdahl_speedup(fraction, n) for n in devices])
        single = (speedup @ measured) / (speedup @ speedup)
        return float(np.sum((measured - single * speedup) ** 2) / np.sum(measured**2))

    return float(minimize_scalar(squares, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x)
