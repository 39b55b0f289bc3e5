"""The part of the suite for engines whose steps can be called one by one."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .lab import CLIP_NORM, mechanism
from .problems import Autoencoder, flat
from .subjects import Engine
from .suite import Conformance


class EngineConformance(Conformance):
    """What an example can do to a sum, and which sums can be released."""

    subject: ClassVar[Engine]

    def test_no_example_moves_the_sum_by_more_than_the_clip_norm(self):
        """Each is taken away in turn: large ones, small ones, some in one parameter alone.

        To a millionth: a factor rounded to bfloat16 lets one through that is 4 thousandths too large.
        """
        problem = worst_cases()
        sum_of = self.subject.clipped(problem, CLIP_NORM)
        everyone = np.ones(problem.size, bool)
        whole = flat(sum_of(everyone))
        assert np.isfinite(whole).all()
        for index in range(problem.size):
            moved = np.linalg.norm(whole - flat(sum_of(everyone & (np.arange(problem.size) != index))))
            assert moved < CLIP_NORM * (1 + 1e-5), (
                f"example {index} moves the sum by {moved / CLIP_NORM:.3f} C."
            )

    def test_a_sum_clipped_otherwise_is_not_released(self):
        problem = self.lab.problem
        own = mechanism(problem.size, steps=1)
        for clip_norm, method in ((2 * CLIP_NORM, "auto"), (CLIP_NORM, "non-private")):
            try:
                self.subject.release(problem, clip_norm, method, own)
            except ValueError:
                continue
            raise AssertionError(f"a sum of {method} clipped to {clip_norm} was released for {CLIP_NORM}.")


def worst_cases() -> Autoencoder:
    """Gradients of all lengths, in all parameters or in one alone.

    All are finite: where one is not, an engine may go another way.
    """
    problem = Autoencoder(size=16, seed=5)
    rng = np.random.default_rng(6)
    zeros = np.zeros(problem.features)
    for index, length in enumerate((1e-3, 0.9, 3, 30, 1e3, 1e6)):
        problem.data["x"][index] = rng.normal(size=problem.features) * length
    problem.data["x"][6:9], problem.data["t"][6:9] = zeros, (0.1, 1.0, 1e8)
    problem.data["x"][12] = problem.data["x"][13]
    return problem
