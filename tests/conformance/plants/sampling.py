"""Faults of the sampler and of its accountant, which both engines share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dptrain.core import accounting, sampling
from dptrain.core.sampling import LogicalSampler
from dptrain.core.spec import StepSpec

from .common import Patch


def rate(changed: Callable[[float], float]) -> Callable[[Patch], None]:
    """Examples are drawn at ``changed(q)``."""

    def plant(patch: Patch) -> None:
        patch.around(
            sampling, "poisson_sample", lambda true: lambda rng, n, q: true(rng, n, min(1.0, changed(q)))
        )

    return plant


def _sampler(patch: Patch, change: Callable[[Callable], Callable]) -> None:
    patch.around(LogicalSampler, "sample", change)


def shuffled(patch: Patch) -> None:
    def sample(sampler: LogicalSampler, step: int) -> Any:
        parts = max(1, round(1 / sampler.sampling.sample_rate))
        epoch, part = divmod(step, parts)
        order = sampler.key.child("epoch", epoch).numpy_generator().permutation(sampler.dataset_size)
        return np.sort(np.array_split(order, parts)[part])

    _sampler(patch, lambda true: sample)


def of_a_fixed_size(patch: Patch) -> None:
    def fixed(rng: Any, dataset_size: int, sample_rate: float) -> Any:
        return sampling.uniform_subset(rng, dataset_size, round(sample_rate * dataset_size))

    patch.replace(sampling, "poisson_sample", fixed)


def truncated(patch: Patch) -> None:
    """To a buffer of the expected size, the first come first."""
    _sampler(
        patch,
        lambda true: (
            lambda sampler, step: true(sampler, step)[
                : math.ceil(sampler.sampling.sample_rate * sampler.dataset_size)
            ]
        ),
    )


def once_for_all_steps(patch: Patch) -> None:
    _sampler(patch, lambda true: lambda sampler, step: true(sampler, 0))


# ------------------------------------------------------------------------------------------ accounting


def _accountant(patch: Patch, change: Callable[[StepSpec, int], tuple[StepSpec, int]]) -> None:
    """What it is told of a run of equal steps."""
    _forget(patch)
    patch.around(accounting, "_run", lambda true: lambda spec, count: true(*change(spec, count)))


def _forget(patch: Patch) -> None:
    # Answers are remembered, right and wrong ones.
    accounting.epsilon.cache_clear()
    patch.undo.callback(accounting.epsilon.cache_clear)


def fewer_steps(patch: Patch) -> None:
    _accountant(patch, lambda spec, count: (spec, math.ceil(count / 10)))


def larger_noise(patch: Patch) -> None:
    _accountant(patch, lambda spec, count: (replace(spec, noise_multiplier=2 * spec.noise_multiplier), count))


def wrong_neighbours(patch: Patch) -> None:
    _forget(patch)
    relations = dict(accounting.RELATIONS)
    relations[accounting.REPLACE_ONE] = relations[accounting.ADD_OR_REMOVE_ONE]
    patch.replace(accounting, "RELATIONS", relations)
