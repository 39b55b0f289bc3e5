"""Runs to look at, each taken once for a subject, and what can be read off them.

Releases of a mechanism with next to no noise show everything that is usually hidden: which examples were
sampled, how often each was counted, and whether the sum is that of their clipped gradients. Runs whose
batches are always empty show the noise and nothing else.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np

from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

from .problems import Arrays, Autoencoder, Problem, clipped_gradients, flat
from .subjects import Run, Subject, Task

CLIP_NORM = 0.75
PHYSICAL = 7
NEXT_TO_NO_NOISE = 1e-6
ALPHA = 1e-7
"""Significance of each statistical test: all of a run of the suite together err less than once in 10^5."""

HUGE = 1e25
"""Finite, but its gradient is not."""


def mechanism(size: int, slack: float = 1.0, **changes: Any) -> Mechanism:
    """Everybody in each of 2 steps; L is ``slack`` times q N."""
    rate = changes.get("sample_rate", 1.0)
    options = {
        "noise_multiplier": 1.0,
        "clip_norm": CLIP_NORM,
        "sample_rate": rate,
        "steps": 2,
        "expected_batch_size": slack * rate * size,
    }
    return Mechanism.constant(**(options | changes))


class Lab:
    """The runs of one subject, each taken when it is first asked for."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.problem = subject.problem()
        self.size = len(self.problem.data["x"])
        self.keys = KeysInUse()  #: of ``empty``

    def run(self, problem: Any, physical: int = PHYSICAL, seed: int | None = None, **changes: Any) -> Run:
        own = mechanism(self.size, self.subject.slack, **changes)
        return self.subject.run(Task(problem, own, physical, seed))

    # ------------------------------------------------------------------------------------------- runs

    @cached_property
    def sampled(self) -> Run:
        """Poisson samples of three eighths; no noise to speak of."""
        return self.run(self.problem, noise_multiplier=NEXT_TO_NO_NOISE, sample_rate=self.rate, steps=80)

    rate, seed = 0.375, 3

    @cached_property
    def full(self) -> Run:
        """Everybody, with noise, and what it costs."""
        return self.run(self.problem, seed=self.seed, delta=1e-5)

    @cached_property
    def full_at_once(self) -> Run:
        """The same, in one physical batch."""
        return self.run(self.problem, self.size, self.seed, delta=1e-5)

    @cached_property
    def empty(self) -> Run:
        """Nobody, with noise. L is a power of two, so that dividing by it rounds nothing."""
        with self.keys:
            return self._nobody()

    def _nobody(self) -> Run:
        rate = 2.0**-25 / self.size
        return self.run(self.problem, sample_rate=rate, expected_batch_size=2.0**-25, steps=4)

    @cached_property
    def empty_again(self) -> Run:
        return self._nobody()

    @cached_property
    def broken(self) -> Run:
        """Everybody, and some whose gradients are not finite; no noise to speak of."""
        return self.run(self.broken_problem, noise_multiplier=NEXT_TO_NO_NOISE)

    @cached_property
    def broken_problem(self) -> Problem:
        """The ordinary one where the subject's data cannot be broken."""
        if not isinstance(self.problem, Autoencoder):
            return self.problem
        x = np.ones(self.problem.features, np.float32)
        return self.problem.replaced(
            {1: {"x": x * np.nan}, 8: {"x": x * HUGE}, 15: {"t": np.inf}, 20: {"x": -x * np.inf}}
        )

    # ------------------------------------------------------------------------- what can be read off them

    def counts(self, run: Run, problem: Problem, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """How often each example was counted in each step, ``[T, N]``, and what no example explains, ``[T]``.

        From releases without noise: the sum is L times the release, and clipped gradients of different
        examples are linearly independent, so only one combination of them gives it. Examples that must
        contribute nothing have a count of 0 if nothing is unexplained.
        """
        counts, rests = [], []
        for weights, release in zip(run.weights, run.releases, strict=True):
            parts = clipped_gradients(problem, weights, CLIP_NORM)
            total = flat(release) * self.subject.slack * rate * self.size
            assert np.isfinite(total).all(), "a release is not finite."
            count, *_ = np.linalg.lstsq(parts.T, total, rcond=1e-9)
            counts.append(count)
            rests.append(np.linalg.norm(total - count @ parts))
        return np.array(counts), np.array(rests)

    @cached_property
    def batches(self) -> np.ndarray:
        """Who was in each batch of ``sampled``, bool ``[T, N]``."""
        counts, _ = self.counts(self.sampled, self.problem, self.rate)
        return counts > 0.5

    @cached_property
    def noise(self) -> list[Arrays]:
        """Of ``empty``, by step, on the sum."""
        return [
            {name: x.astype(np.float64) * 2.0**-25 for name, x in release.items()}
            for release in self.empty.releases
        ]

    @cached_property
    def noise_of_full(self) -> np.ndarray:
        """``[T, P]``, on the sum."""
        out = []
        for weights, release in zip(self.full.weights, self.full.releases, strict=True):
            total = clipped_gradients(self.problem, weights, CLIP_NORM).sum(0)
            out.append(flat(release) * self.subject.slack * self.size - total)
        return np.array(out)


class KeysInUse(ExitStack):
    """Writes down which keys are used for what: ``used`` holds (purpose, key) as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[tuple[str, Key]] = []

    def __enter__(self) -> KeysInUse:
        for name in ("cipher_key", "numpy_generator", "seed64"):
            true = getattr(Key, name)

            def noted(key: Key, true: Any = true, name: str = name) -> Any:
                self.used.append((name, key))
                return true(key)

            self.enter_context(mock.patch.object(Key, name, noted))
        return self
