"""From step specifications to a `DpEvent`, and from there to ε.

The arithmetic is dp-accounting's. What is ours is the translation, and the refusal of
every combination of sampler, neighbouring relation and accountant that dp-accounting
does not account. `supported` is the whole list; each line of it is argued for here:

- ``poisson``: `PoissonSampledDpEvent(q, GaussianDpEvent(σ))`. The PLD accountant knows
  it under all three relations, the RDP accountant not under ``replace-one``.
- ``truncated-poisson``: `TruncatedSubsampledGaussianDpEvent`, PLD only
  (https://arxiv.org/abs/2508.15089). The event holds for one size of the data set, and
  its cost is not monotone in that size, so it is used only under the two relations that
  leave the size alone.
- ``fixed-size``: `SampledWithoutReplacementDpEvent`, which dp-accounting accounts by
  RDP and under ``replace-one`` only. That accountant takes the noise multiplier with
  respect to the *sensitivity* of the sum (theorem 27 of
  https://arxiv.org/abs/1808.00087), and replacing an example of norm at most C by
  another moves the sum by up to 2C: the event therefore carries σ/2, not σ.
- ``shuffle-without-amplification``: let every step of an epoch be published. Fix the
  order of all epochs. Replacing one example changes one batch of each epoch, by at most
  C if the substitute is the zero record (``replace-special``) or 2C if it is any other
  (``replace-one``); all other steps of that epoch are independent of the example. An
  epoch is thus one Gaussian mechanism, adaptively composed over the epochs that have
  begun; and since the orders are drawn without looking at the data, averaging over them
  cannot raise the hockey-stick divergence, which is jointly convex. Under
  ``add-or-remove-one`` the argument fails: with one example more, a permutation cut
  into batches moves *other* examples between batches, so it is refused. So is RDP under
  ``replace-one``, since dp-accounting's RDP takes a plain Gaussian's sensitivity as C
  whatever the relation.

- ``cyclic-poisson``: an example takes part in the steps of its own group alone, every cycle-th, in
  each of which it is drawn with probability cycle · q: as if there were ⌈n / cycle⌉ steps of
  ``poisson`` with that rate (theorem 4 of https://arxiv.org/abs/2306.08153). Groups are drawn for each
  example independently, so that one example more leaves those of the others alone. Correlated noise
  does not change this (`dptrain.core.correlated`).

Hardened steps, whose sums lie on an integer grid, are post-processing of the Gaussian
mechanism (`dptrain.core.grid`) and have its events. All their noise lies within a total
variation distance t = 2^-211 of what it should be (`dptrain.core.rounded_gaussian`), which
adds (1 + e^ε) t to δ: less than its last digit, or else ε is given as infinite.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from dptrain.core import checks, rounded_gaussian
from dptrain.core.spec import CYCLIC_POISSON, FIXED_SIZE, POISSON, SHUFFLE, TRUNCATED_POISSON, StepSpec

PLD = "pld"
RDP = "rdp"
ACCOUNTANTS = (PLD, RDP)

ADD_OR_REMOVE_ONE = "add-or-remove-one"
REPLACE_ONE = "replace-one"
REPLACE_SPECIAL = "replace-special"

RELATIONS = {
    ADD_OR_REMOVE_ONE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
    REPLACE_SPECIAL: NeighboringRelation.REPLACE_SPECIAL,
}

NO_NOISE = 1e-150
"""The square of less vanishes."""
MOST_NOISE = 1e100
"""Larger noise multipliers count as this one: their squares overflow."""
LITTLE_NOISE = 0.3
LARGEST_BY_PLD = 500.0
"""Above such an ε, which means nothing, a privacy loss distribution takes gigabytes and, for less noise
still, more than there is; the Rényi bound is good enough."""

# Runs of equal steps: (specification, how many times).
Segments = tuple[tuple[StepSpec, int], ...]

_SUPPORTED: dict[tuple[str, str], tuple[str, ...]] = {
    (POISSON, ADD_OR_REMOVE_ONE): (PLD, RDP),
    (POISSON, REPLACE_SPECIAL): (PLD, RDP),
    (POISSON, REPLACE_ONE): (PLD,),
    (TRUNCATED_POISSON, REPLACE_SPECIAL): (PLD,),
    (TRUNCATED_POISSON, REPLACE_ONE): (PLD,),
    (FIXED_SIZE, REPLACE_ONE): (RDP,),
    (CYCLIC_POISSON, ADD_OR_REMOVE_ONE): (PLD, RDP),
    (CYCLIC_POISSON, REPLACE_SPECIAL): (PLD, RDP),
    (CYCLIC_POISSON, REPLACE_ONE): (PLD,),
    (SHUFFLE, REPLACE_SPECIAL): (PLD, RDP),
    (SHUFFLE, REPLACE_ONE): (PLD,),
}


def supported(sampler: str, neighbours: str) -> tuple[str, ...]:
    """The accountants that can account `sampler` under the relation `neighbours`."""
    return _SUPPORTED.get((sampler, neighbours), ())


def check_supported(segments: Segments, neighbours: str, accountant: str | None = None) -> None:
    """Refuse what cannot be accounted.

    Args:
        segments: runs of equal steps.
        neighbours: a key of `RELATIONS`.
        accountant: ``pld``, ``rdp``, or None for "any will do".

    Raises:
        ValueError: an unknown relation or accountant; a sampler that no accountant, or
            not this one, accounts under the relation; shuffling that is not constant.
    """
    checks.one_of("neighbouring relation", neighbours, RELATIONS)
    if accountant is not None:
        checks.one_of("accountant", accountant, ACCOUNTANTS)
    samplers = {spec.sampler for spec, _ in segments}
    for sampler in sorted(samplers):
        usable = supported(sampler, neighbours)
        if not usable:
            relations = [r for r in RELATIONS if supported(sampler, r)]
            raise ValueError(
                f"sampler '{sampler}' cannot be accounted under the neighbouring relation "
                f"'{neighbours}'; choose {_either(relations)} for neighbours, "
                f"or sampler '{POISSON}'."
            )
        if accountant is not None and accountant not in usable:
            raise ValueError(
                f"the accountant '{accountant}' does not account sampler '{sampler}' under "
                f"'{neighbours}'; choose accountant {_either(usable)}."
            )
    for sampler in {SHUFFLE, CYCLIC_POISSON} & samplers if len(segments) > 1 else ():
        raise ValueError(
            f"sampler '{sampler}' is accounted by whole epochs or cycles of equal steps; keep every quantity "
            "of the mechanism constant, or sample by Poisson."
        )


def event(segments: Segments, neighbours: str = ADD_OR_REMOVE_ONE) -> dp_accounting.DpEvent:
    """The steps in dp-accounting's vocabulary, to be accounted under `neighbours`.

    Raises:
        ValueError: no accountant accounts one of the samplers under the relation.
    """
    check_supported(segments, neighbours)
    runs = [_run(spec, count) for spec, count in segments if count]
    events = [dp_accounting.SelfComposedDpEvent(step, count) for step, count in runs]
    if not events:
        return dp_accounting.NoOpDpEvent()
    if len(events) == 1:
        return events[0]
    return dp_accounting.ComposedDpEvent(events)


# Pure function of hashable, frozen arguments: the memo cannot be seen from outside
# except as time.
@functools.lru_cache(maxsize=1024)
def epsilon(
    segments: Segments,
    delta: float,
    neighbours: str = ADD_OR_REMOVE_ONE,
    accountant: str = PLD,
) -> float:
    """The ε of (ε, δ)-differential privacy of all `segments` together, an upper bound.

    No steps cost 0; a step without noise costs infinity. Hardened steps cost what ordinary ones do, as long
    as the error of their sampler does not show in δ (for δ = 1e-5, up to ε = 98), and infinity beyond.

    Args:
        segments: runs of equal steps.
        delta: δ, strictly between 0 and 1.
        neighbours: a key of `RELATIONS`.
        accountant: ``pld`` (privacy loss distributions, discretised pessimistically; above
            `LARGEST_BY_PLD` as ``rdp``) or ``rdp`` (Rényi; looser, much faster).

    Raises:
        ValueError: a quantity out of range or a combination that is not supported.
    """
    delta = checks.delta(delta)
    check_supported(segments, neighbours, accountant)
    segments = tuple((spec, count) for spec, count in segments if count)
    if not segments:
        return 0.0
    if any(spec.grid is not None for spec, _ in segments):
        ordinary = merge([(dataclasses.replace(spec, grid=None), count) for spec, count in segments])
        spent = epsilon(ordinary, delta, neighbours, accountant)
        lost = (1 + math.exp(min(spent, 200.0))) * rounded_gaussian.ERROR
        return spent if delta - lost == delta else math.inf
    if any(spec.noise_multiplier < NO_NOISE for spec, _ in segments):
        return math.inf
    if accountant == RDP:
        return _rdp_epsilon(segments, delta, neighbours)
    little = min(spec.noise_multiplier for spec, _ in segments) < LITTLE_NOISE
    if little and all(RDP in supported(spec.sampling.sampler, neighbours) for spec, _ in segments):
        bound = _rdp_epsilon(segments, delta, neighbours)
        if bound > LARGEST_BY_PLD:
            return bound
    engine = PLDAccountant(RELATIONS[neighbours])
    return float(engine.compose(event(segments, neighbours)).get_epsilon(delta))


def merge(segments: Sequence[tuple[StepSpec, int]]) -> Segments:
    """`segments` with equal neighbours joined and empty runs dropped."""
    merged: list[tuple[StepSpec, int]] = []
    for spec, count in segments:
        if not count:
            continue
        if merged and merged[-1][0] == spec:
            merged[-1] = (spec, merged[-1][1] + count)
        else:
            merged.append((spec, count))
    return tuple(merged)


def recorded(steps: Iterable[tuple[int, StepSpec]]) -> Segments:
    """The segments of steps that were taken, by index, in the order in which they were.

    Where an index does not follow the one before, another draw began: a run that lost steps drew them
    afresh. For samplers that draw each step by itself that makes no difference. Of shuffled epochs, and of
    cycles, an example may have been in those of both draws: each that a draw has touched counts as a whole.
    """
    runs: list[tuple[StepSpec, int]] = []
    last: tuple[int, StepSpec] | None = None
    for index, spec in steps:
        period = spec.sampling.period
        if period is None:
            runs.append((spec, 1))
        elif begins_period(last, index, spec):
            runs.append((spec, period))
        last = index, spec
    return merge(runs)


def begins_period(last: tuple[int, StepSpec] | None, index: int, spec: StepSpec) -> bool:
    """Whether a step after the `last` one, by (index, specification), begins a shuffled epoch or a cycle that
    has to be paid for: a new one of the same draw, or any part of another draw's."""
    period = spec.sampling.period
    return period is not None and (last != (index - 1, spec) or index % period == 0)


def _run(spec: StepSpec, count: int) -> tuple[dp_accounting.DpEvent, int]:
    """The event that `count` equal steps compose, and how many times they do."""
    # Less noise costs no less, so epsilon is not understated.
    sampling, sigma = spec.sampling, min(spec.noise_multiplier, MOST_NOISE)
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    match sampling.sampler:
        case "poisson":
            return dp_accounting.PoissonSampledDpEvent(sampling.sample_rate, gaussian), count
        case "truncated-poisson":
            truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=sampling.dataset_size,
                sampling_probability=sampling.sample_rate,
                truncated_batch_size=sampling.max_batch_size,
                noise_multiplier=sigma,
            )
            return truncated, count
        case "fixed-size":
            # σ/2: see the module's docstring.
            subset = dp_accounting.SampledWithoutReplacementDpEvent(
                sampling.dataset_size, sampling.batch_size, dp_accounting.GaussianDpEvent(sigma / 2)
            )
            return subset, count
        case "shuffle-without-amplification":
            # An epoch that has begun may already have used the example.
            return gaussian, math.ceil(count / sampling.steps_per_epoch)
        case "cyclic-poisson":
            assert sampling.cycle is not None
            sampled = dp_accounting.PoissonSampledDpEvent(sampling.group_rate, gaussian)
            return sampled, math.ceil(count / sampling.cycle)
        case other:
            raise ValueError(f"sampler {other!r} has no accounting.")


def _rdp_epsilon(segments: Segments, delta: float, neighbours: str) -> float:
    # Rényi divergences of composed steps add up, order by order: the expensive part is
    # that of one step, and ε after every step of a run comes almost for nothing.
    orders = RdpAccountant().orders
    total = np.zeros(len(orders))
    for spec, count in segments:
        step, times = _run(spec, count)
        total += times * _step_rdp(step, neighbours)
    # A divergence is never negative. Where rounding makes one so, dp-accounting would
    # answer ε = 0; leave that order out instead, as it leaves out others: as infinite.
    total[total < 0] = np.inf
    epsilon, _ = compute_epsilon(orders, total, delta)
    return float(epsilon)


@functools.lru_cache(maxsize=1024)
def _step_rdp(step: dp_accounting.DpEvent, neighbours: str) -> npt.NDArray[np.float64]:
    # Next to no noise overflows to an infinite divergence, which is what it has.
    with _without_warnings_of_excluded_orders(), np.errstate(over="ignore"):
        engine = RdpAccountant(neighboring_relation=RELATIONS[neighbours]).compose(step)
    rdp = np.array(engine.rdp, dtype=np.float64)
    rdp.setflags(write=False)
    return rdp


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


@contextmanager
def _without_warnings_of_excluded_orders() -> Iterator[None]:
    # The RDP accountant warns of each Rényi order that it leaves out because a series
    # does not converge. The minimum over the remaining orders is still an upper bound.
    def keep(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
