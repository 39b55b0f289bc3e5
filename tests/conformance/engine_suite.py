"""The part of the suite for engines whose steps can be called one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .lab import CLIP_NORM, NEXT_TO_NO_NOISE, mechanism
from .problems import Autoencoder, clipped_gradients, flat
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

    def test_a_neighbour_moves_the_release_by_at_most_the_clip_norm_over_the_public_size(self):
        """Re:cord-play on whole steps: the same randomness, one example taken away, all else as it was.

        The example is the first, which also fills physical batches up, and the one with the largest gradient.
        """
        lab = self.lab
        nothing = {"x": 0.0, "t": 0.0}  # an example without a gradient
        neighbour = lab.run(lab.problem.replaced({0: nothing}), seed=lab.seed, delta=1e-5)
        assert neighbour.told == lab.full.told and neighbour.epsilon == lab.full.epsilon
        for mine, theirs in zip(lab.full.releases, neighbour.releases, strict=True):
            moved = np.linalg.norm(flat(mine) - flat(theirs)) * self.subject.slack * lab.size
            assert 0.99 * CLIP_NORM < moved < 1.0001 * CLIP_NORM, f"it moves by {moved / CLIP_NORM:.3f} C."

    def test_the_divisor_is_the_same_for_any_number_of_examples(self):
        """L belongs to the mechanism: with one example more or less it stays."""
        lab = self.lab
        for size in (200, 201):
            problem = Autoencoder(size=size)
            options = {"noise_multiplier": NEXT_TO_NO_NOISE, "expected_batch_size": 200.5, "steps": 1}
            (release,) = lab.run(problem, **options).releases
            total = clipped_gradients(problem, problem.weights, CLIP_NORM).sum(0)
            assert np.linalg.norm(flat(release) * 200.5 - total) < 1e-3 * CLIP_NORM

    def test_other_samplers_draw_what_is_accounted(self):
        lab = self.lab
        options = {"noise_multiplier": NEXT_TO_NO_NOISE, "steps": 8, "neighbours": "replace-one"}

        def batches(rate: float, **more: Any) -> np.ndarray:
            run = lab.run(lab.problem, sample_rate=rate, **options, **more)
            counts, rest = lab.counts(run, lab.problem, rate)
            assert rest.max() < 1e-4 * CLIP_NORM and np.abs(counts - np.round(counts)).max() < 1e-3
            return np.round(counts)

        fixed = batches(lab.rate, sampler="fixed-size", dataset_size=lab.size)
        assert (fixed.sum(1) == lab.rate * lab.size).all() and (fixed.max(0) == 1).sum() > lab.size / 2
        cut = batches(lab.rate, sampler="truncated-poisson", dataset_size=lab.size, max_batch_size=8)
        assert (cut.sum(1) <= 8).all() and cut.max() == 1
        shuffled = batches(0.25, sampler="shuffle-without-amplification")
        assert (shuffled[:4].sum(0) == 1).all() and (shuffled[4:].sum(0) == 1).all()

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
