"""The conformance suite: what every way of taking private steps must show from outside.

An engine inherits it by naming its subject. Each test is a plain function of a lab, so that
``test_faults.py`` can see them fail.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from dptrain.core.mechanism import Mechanism

from .lab import ALPHA, CLIP_NORM, Lab
from .problems import clipped_gradients, flat
from .subjects import Subject

DELTA = 1e-5


class Conformance:
    """Whole steps, as they are released."""

    subject: ClassVar[Subject]
    _labs: ClassVar[dict[type, Lab]] = {}

    @property
    def lab(self) -> Lab:
        """One for all tests of a class."""
        if type(self) not in self._labs:
            self._labs[type(self)] = Lab(self.subject)
        return self._labs[type(self)]

    # ---------------------------------------------------------------------------------------- the sum

    def test_a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size(self):
        """Each example once or not at all: no mean, no divisor made of the data, no padding, no cut."""
        lab = self.lab
        counts, rest = lab.counts(lab.sampled, lab.problem, lab.rate)
        assert rest.max() < 1e-4 * CLIP_NORM, "the release holds more than gradients clipped to C."
        assert np.abs(counts - np.round(counts)).max() < 1e-3, "an example does not count as a whole."
        assert set(np.unique(np.round(counts))) <= {0, 1}, "an example counts more than once."

    def test_examples_without_a_finite_gradient_contribute_nothing_and_the_others_all(self):
        lab = self.lab
        counts, rest = lab.counts(lab.broken, lab.broken_problem, 1.0)
        assert rest.max() < 1e-4 * CLIP_NORM, "something of such an example is in the release."
        parts = clipped_gradients(lab.broken_problem, lab.broken.weights[0], CLIP_NORM)
        good = parts.any(1)
        assert np.abs(counts[:, good] - 1).max() < 1e-3, "an example is lost."

    def test_what_a_step_tells_does_not_depend_on_the_data(self):
        """As in Re:cord-play (Cebere et al. 2026, arXiv 2602.17454): nothing but the release may differ."""
        assert self.lab.broken.told == self.lab.full.told

    def test_the_physical_batch_size_changes_nothing(self):
        for few, many in zip(self.lab.full_at_once.releases, self.lab.full.releases, strict=True):
            np.testing.assert_allclose(flat(few), flat(many), rtol=1e-4, atol=1e-5)

    # --------------------------------------------------------------------------------------- sampling

    def test_examples_are_drawn_at_the_stated_rate(self):
        batches = self.lab.batches
        found = stats.binomtest(int(batches.sum()), batches.size, self.lab.rate)
        assert found.pvalue > ALPHA, f"the sample rate is {batches.mean():.3f}, not {self.lab.rate}."

    def test_every_example_is_drawn_at_the_same_rate(self):
        batches, rate = self.lab.batches, self.lab.rate
        times, steps = batches.sum(0), len(batches)
        spread = float(((times - steps * rate) ** 2).sum() / (steps * rate * (1 - rate)))
        assert stats.chi2.sf(spread, len(times)) > ALPHA, "some examples are drawn more often than others."

    def test_batch_sizes_vary_as_those_of_poisson_samples_do(self):
        batches, rate = self.lab.batches, self.lab.rate
        sizes, expected = batches.sum(1), batches.shape[1] * rate
        spread = float(((sizes - expected) ** 2).sum() / (expected * (1 - rate)))
        assert stats.chi2.cdf(spread, len(sizes)) > ALPHA, "batches are of one size."
        assert stats.chi2.sf(spread, len(sizes)) > ALPHA, "batch sizes vary too much."
        none_larger = stats.binom.cdf(math.ceil(expected), batches.shape[1], rate) ** len(sizes)
        assert sizes.max() > math.ceil(expected) or none_larger > ALPHA, "batches are cut."

    def test_batches_are_independent_of_each_other(self):
        """Neither the same examples again nor, as in a shuffled epoch, always others."""
        batches, size = self.lab.batches, self.lab.size
        for distance in (1, 2):
            # Given their sizes, how many examples two batches share is hypergeometric.
            sizes = batches.sum(1)[distance:], batches.sum(1)[:-distance]
            excess = (batches[distance:] & batches[:-distance]).sum() - (sizes[0] * sizes[1] / size).sum()
            spread = math.sqrt(stats.hypergeom.var(size, *sizes).sum())
            assert abs(excess) < spread * stats.norm.isf(ALPHA / 2), f"batches {distance} apart are alike."

    # ------------------------------------------------------------------------------------------ noise

    def test_an_empty_batch_takes_a_noisy_step(self):
        run = self.lab.empty
        assert len(run.releases) == len(run.told) == 4
        assert all(flat(release).any() for release in run.releases), "a step was taken without noise."

    def test_every_element_of_every_parameter_gets_noise(self):
        for noise in self.lab.noise:
            for name, values in noise.items():
                assert values.all(), f"{name} has elements without noise."

    def test_noise_has_the_stated_standard_deviation(self):
        """On the sum: sigma C, whether or not there is an example, and however many physical batches."""
        lab = self.lab
        for noise in (np.array([flat(n) for n in lab.noise]), lab.noise_of_full):
            spread = float((noise**2).sum() / CLIP_NORM**2)
            ratio = math.sqrt(spread / noise.size)
            assert stats.chi2.cdf(spread, noise.size) > ALPHA, f"the noise is {ratio:.2f} of what is stated."
            assert stats.chi2.sf(spread, noise.size) > ALPHA, f"the noise is {ratio:.2f} of what is stated."

    def test_noise_is_normal(self):
        values = np.concatenate([flat(n) for n in self.lab.noise]) / CLIP_NORM
        assert stats.kstest(values, "norm").pvalue > ALPHA

    def test_noise_is_new_in_every_step(self):
        steps = [flat(n) for n in self.lab.noise]
        for one, other in combinations(steps, 2):
            assert stats.pearsonr(one, other).pvalue > ALPHA, "two steps share noise."

    def test_parameters_do_not_share_noise(self):
        names = sorted(self.lab.noise[0])
        for one, other in combinations(names, 2):
            seen = [np.concatenate([n[name].ravel() for n in self.lab.noise]) for name in (one, other)]
            # Two of the 2^24 numbers of float32 may be equal, not more.
            assert len(np.intersect1d(np.abs(seen[0]), np.abs(seen[1]))) < 3, (
                f"{one} and {other} share noise."
            )
            length = (min(self.lab.noise[0][name].size for name in (one, other)) + 1) // 2
            heads = [
                np.concatenate([n[name].ravel()[:length] for n in self.lab.noise]) for name in (one, other)
            ]
            assert stats.pearsonr(*heads).pvalue > ALPHA, f"{one} and {other} share noise."

    def test_elements_do_not_share_noise(self):
        largest = max(self.lab.noise[0], key=lambda name: self.lab.noise[0][name].size)
        rows = np.array([n[largest].ravel() for n in self.lab.noise])
        for lag in (1, rows.shape[1] // 2):
            assert stats.pearsonr(rows[:, lag:].ravel(), rows[:, :-lag].ravel()).pvalue > ALPHA

    def test_noise_has_all_digits_of_float32(self):
        """A coarser grid would show the low digits of the sum (Mironov 2012, "On significance...")."""
        words = np.concatenate([flat(r) for r in self.lab.empty.releases]).astype(np.float32).view(np.uint32)
        assert np.mean((words & 0xFFF) == 0) < 0.05, "the noise lies on a coarse grid."
        assert len(np.unique(words)) > 0.99 * words.size

    def test_without_a_key_randomness_is_fresh(self):
        for mine, theirs in zip(self.lab.empty.releases, self.lab.empty_again.releases, strict=True):
            assert np.mean(flat(mine) == flat(theirs)) < 0.1, "two runs have the same noise."

    def test_every_key_is_used_for_one_thing(self):
        assert len(self.lab.empty.releases) == 4
        noise, samples = (
            {key for used_for, key in self.lab.keys.used if used_for == purpose}
            for purpose in ("cipher_key", "numpy_generator")
        )
        assert not noise & samples, "sample and noise come from one key."
        assert len(noise) >= 4 and len(samples) >= 4, "two steps use one key."

    # ------------------------------------------------------------------------------------- accounting

    def test_all_steps_are_taken_and_no_more(self):
        for run, steps in ((self.lab.sampled, 80), (self.lab.empty, 4)):
            assert len(run.releases) == len(run.told) == steps

    def test_the_stated_epsilon_is_that_of_the_noise_and_the_steps(self):
        """At q = 1 the steps are one Gaussian mechanism, whose epsilon has a closed form."""
        stated = self.lab.full.epsilon
        true = gaussian_epsilon(1 / math.sqrt(2))
        assert stated is not None and true <= stated < 1.01 * true, f"{stated} is stated, {true} is true."

    def test_replacing_an_example_costs_what_twice_the_sensitivity_does(self):
        for steps in (1, 25):
            for neighbours, moved in (("add-or-remove-one", 1), ("replace-special", 1), ("replace-one", 2)):
                own = self.lab_mechanism(steps=steps, noise_multiplier=5.0, neighbours=neighbours)
                true = gaussian_epsilon(5 / moved / math.sqrt(steps))
                assert true <= own.epsilon(DELTA) < 1.01 * true, neighbours

    def test_calibrated_noise_meets_the_budget(self):
        own = Mechanism.calibrate(
            epsilon=2.0, delta=DELTA, sample_rate=1.0, steps=10, clip_norm=1.0, expected_batch_size=8
        )
        assert 0.99 * 2 < gaussian_epsilon(own.noise_multiplier / math.sqrt(10)) <= 2

    @staticmethod
    def lab_mechanism(**changes: Any) -> Mechanism:
        options = {"clip_norm": CLIP_NORM, "sample_rate": 1.0, "expected_batch_size": 8}
        return Mechanism.constant(**(options | changes))


def gaussian_epsilon(sigma: float, delta: float = DELTA) -> float:
    """Epsilon of one Gaussian mechanism of sensitivity 1: Balle and Wang (2018), theorem 8."""
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        a, b = 1 / (2 * sigma) - middle * sigma, -1 / (2 * sigma) - middle * sigma
        if stats.norm.cdf(a) - math.exp(middle + stats.norm.logcdf(b)) > delta:
            low = middle
        else:
            high = middle
    return high
