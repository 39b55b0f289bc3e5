"""Noise that steps share in part, so that it cancels in the sum over steps: banded matrix factorisation.

Ordinarily step t releases its clipped sum G_t and fresh noise, and the weights after n steps hold the noise
of all of them. Let C be a lower triangular Toeplitz matrix of b bands, with coefficients c_0, ..., c_(b-1),
and let the steps release

    G + C^-1 W,    W_t ~ N(0, (sigma S)^2) independent, S the sensitivity of a clipped sum,

which is C^-1 (C G + W): post-processing of the Gaussian mechanism on C G. An example that takes part in steps
at least b apart moves C G in disjoint blocks of rows, in each by at most sqrt(sum c_j^2) S <= S. So ε is that
of independent noise of the same sigma, with as many releases as the example has turns (Choquette-Choo et al.
2023, "(Amplified) banded matrix factorization: a unified approach to private training", arXiv 2306.08153,
theorem 4). The sampler ``cyclic-poisson`` keeps turns apart. Noise follows from that of the steps before:

    Z_t = (W_t - c_1 Z_(t-1) - ... - c_(b-1) Z_(t-b+1)) / c_0.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from dptrain.core import calibration, checks
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD
from dptrain.core.clip_rules import ClipRule, Flat
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import CYCLIC_POISSON, Sampling, StepSpec


def square_root(bands: int) -> tuple[float, ...]:
    """Coefficients c_0, ..., c_(b-1) whose squares add up to 1: the banded square root of prefix sums.

    The square root of the matrix of prefix sums has the coefficients (2k choose k) / 4^k; so many of them,
    divided by their norm.

    Source: Kalinin and Lampert 2024, "Banded square root matrix factorization for differentially private
    model training", arXiv 2405.13763, section 3. (`jax_privacy.matrix_factorization.toeplitz` optimises
    others, which a `StepSpec` takes as well.)
    """
    bands = checks.whole("bands", bands)
    coefficients = [1.0]
    for k in range(1, bands):
        coefficients.append(coefficients[-1] * (2 * k - 1) / (2 * k))
    norm = math.sqrt(math.fsum(c * c for c in coefficients))
    return tuple(c / norm for c in coefficients)


def correlated(
    *,
    bands: int,
    steps: int,
    clip_norm: float | ClipRule,
    sample_rate: float,
    expected_batch_size: float,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: str = PLD,
    neighbours: str = ADD_OR_REMOVE_ONE,
) -> Mechanism:
    """A constant mechanism whose noise is correlated over so many steps, by `square_root`.

    An example takes part in every `bands`-th step at most, with probability bands · q.

    Args:
        epsilon, noise_multiplier: one of them; the noise multiplier is that of W over the sensitivity.
        sample_rate: q, over all steps.

    Raises:
        ValueError: bands · q is above 1, or another quantity is out of its range.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError("give one of epsilon and noise_multiplier.")
    rule = clip_norm if isinstance(clip_norm, ClipRule) else Flat(clip_norm)
    sampling = Sampling(CYCLIC_POISSON, sample_rate, cycle=bands)
    coefficients = square_root(bands)

    def step_with(sigma: float) -> StepSpec:
        return StepSpec(rule, sigma, sampling, expected_batch_size, correlation=coefficients)

    if epsilon is not None:
        noise_multiplier = calibration.smallest_noise_multiplier(
            step_with, steps=steps, epsilon=epsilon, delta=delta, neighbours=neighbours, accountant=accountant
        )
    assert noise_multiplier is not None
    return Mechanism(((step_with(noise_multiplier), steps),), neighbours, delta)


def prefix_error(coefficients: tuple[float, ...], steps: int) -> float:
    """The root mean square over n steps of the noise in the sum of the first t releases, over sigma S.

    Independent noise, (1,), has sqrt((n + 1) / 2).
    """
    steps = checks.whole("steps", steps)
    inverse: list[float] = []
    for t in range(steps):
        earlier = math.fsum(c * inverse[t - j] for j, c in enumerate(coefficients[1 : t + 1], 1))
        inverse.append(((t == 0) - earlier) / coefficients[0])
    prefix, squares, total = 0.0, 0.0, 0.0
    for d in inverse:  # the rows of A C^-1, A of prefix sums, hold prefix sums of the inverse's coefficients
        prefix += d
        squares += prefix * prefix
        total += squares
    return math.sqrt(total / steps)


class NoiseChain:
    """Z_0, Z_1, ..., each from those before it, of which the last bands - 1 are kept: secret, like a key.

    What both engines' `CorrelatedNoise` share. Each draws Z_t from W_t, which a key stands for, by `_drawn`.

    Attributes:
        coefficients: of C, by band.
        steps: how many have been drawn.

    Args:
        taken: steps of a run that goes on, whose noise is drawn again before that of the next.
        key_of: the key of each of them.

    Raises:
        ValueError: steps without their keys.
    """

    def __init__(
        self,
        coefficients: tuple[float, ...],
        taken: int = 0,
        key_of: Callable[[int], Key] | None = None,
    ) -> None:
        if taken and key_of is None:
            raise ValueError("the noise of the steps that were taken is drawn again: say with which keys.")
        self.coefficients = tuple(coefficients)
        self.steps = 0
        self._earlier: deque[Any] = deque(maxlen=len(self.coefficients) - 1)
        self._taken, self._key_of = taken, key_of

    def _next(self, key: Key, drawn: Callable[[Key], Any]) -> Any:
        """The next one, behind all that have to be drawn again.

        drawn: Z_t from the key of W_t; it finds those before in `_earlier`, the last one first.
        """
        while self._key_of is not None and self.steps < self._taken:
            self._keep(drawn(self._key_of(self.steps)))
        return self._keep(drawn(key))

    def _keep(self, noise: Any) -> Any:
        self._earlier.appendleft(noise)
        self.steps += 1
        return noise
