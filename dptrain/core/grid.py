"""The integer grid of hardened steps: how fine it is.

Each clipped gradient is rounded towards zero to multiples of the spacing g, the multiples are summed as
integers, and round(N(0, (sigma C / g)^2)) is added to each. As x + round(Z) = round(x + Z) for an integer x,
what is released is a function of the sum of the *rounded* gradients plus a Gaussian. Rounding towards zero
makes none of them longer, so the step is post-processing of the Gaussian mechanism with the same sigma
and C, and costs the same.

The spacing is the power of two for which the noise has a standard deviation of 2^24 to 2^25 spacings:

* Rounding takes at most g, 2^-24 sigma C, from a coordinate of each example: from a batch of 25,000 that all
  have the same sign at most 0.0015 standard deviations of its noise. An example that has its norm C spread
  over 10^8 coordinates loses 0.03 % of each for sigma = 1. Float32 keeps 24 digits as well.
* An example is at most C / g long. With g at least 2^-31 C, 2^31 examples add up to 2^62 at most, and with
  their noise stay within 64 bits. (For sigma < 2^-6 this makes the grid coarser.)
* About one number in 10^5 is computed at length (`dptrain.core.rounded_gaussian`); 2^28 spacings would
  make it one in 10^4, to no gain.

All steps of a mechanism have one grid, that of the least noise: what clips need not follow a schedule.
"""

import math

from dptrain.core import checks

SPACINGS = 24
"""The noise's standard deviation is 2 to this power spacings, or up to twice as many."""

LARGEST_LENGTH = 31
"""An example is at most 2 to this power spacings long."""


def spacing(noise_stddev: float, sensitivity: float) -> float:
    """The spacing for a noise of at least so much and examples of at most such a norm.

    Raises:
        ValueError: there is no noise.
    """
    if noise_stddev == 0:
        raise ValueError("a step without noise has nothing to be hardened; give a noise multiplier above 0.")
    exponent = max(_exponent(noise_stddev) - SPACINGS, _exponent(sensitivity) + 1 - LARGEST_LENGTH)
    return math.ldexp(1.0, exponent)


def checked(spacing: float, sensitivity: float) -> float:
    """The spacing, if it is a power of two and sums of examples of such a norm cannot overflow.

    Raises:
        TypeError, ValueError: it is not, or they can.
    """
    spacing = checks.positive("grid", spacing)
    if math.frexp(spacing)[0] != 0.5:
        raise ValueError(f"grid must be a power of two, but it is {spacing}; use Mechanism.hardened().")
    if sensitivity / spacing > 2.0**LARGEST_LENGTH:
        raise ValueError(
            f"an example of norm {sensitivity:g} is longer than 2^{LARGEST_LENGTH} spacings of {spacing:g}, "
            "and sums could overflow; use Mechanism.hardened()."
        )
    return spacing


def in_spacings(noise_stddev: float, spacing: float) -> float:
    """The standard deviation of the noise on integers, never less than it should be."""
    return math.nextafter(noise_stddev, math.inf) / spacing  # the product sigma C was rounded


def _exponent(value: float) -> int:
    """Of the largest power of two that is not larger."""
    return math.frexp(value)[1] - 1
