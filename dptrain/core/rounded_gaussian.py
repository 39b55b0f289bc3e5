"""Gaussian numbers rounded to integers, exactly: what is drawn is round(Z) for a real Z ~ N(0, s^2).

Z is a function of infinitely many random bits, of which only as many are drawn as decide round(Z). For u
and v uniform in (0, 1) and [-1/2, 1/2), by Box and Muller (1958),

    Z = s sqrt(-2 ln u) cos(2 pi v),    and the other of the pair has the sine.

The first 64 bits of u and of v give Z~ in float64 and a bound e on |Z~ - Z| for whatever the other bits may
be. Where no half-integer lies within e of Z~, round(Z) = round(Z~). Elsewhere, about once in 10^5, 256
further bits of either are drawn and Z is computed in 384. (The strategy is that of Ziv 1991, "Fast
evaluation of elementary mathematical functions with correctly rounded last bit", here for random numbers.)

**The bound.** Let R = sqrt(-2 ln u), a = ``ACCURACY`` = 2^-46 and h = 2^-53. ``log`` and ``sqrt`` of
float64 are taken to be accurate to a relative a, ``cos`` and ``sin`` to an absolute a: libraries claim 4 h
to 8 h, and a is 128 h. Let w be the first 64 bits of u. Where R~ <= 5, w exceeds 2^45.9, so 2^64 u, which
lies in [w, w + 1], is known to a relative 2^-45.9, its rounding included, and -2 ln u to 2.15 a + a R^2. As
|p - q| <= |p^2 - q^2| / p, R is known to 2.15 a / R~ + 1.03 a R~. The angle is off by less than 2^-49
(three roundings of at most pi h each, and the bits that follow), the cosine by 1.13 a. Together with three
roundings

    |Z~ - Z| <= s a (2.2 / R~ + 2.3 R~) <= 2.5 a s (R~ + 1 / R~) = e.

R~ > 5, once in 2.7 10^5, is left to the long computation.

**What remains.** The long computation takes the middles of cells of width 2^-320 for u and v, and rounds
what it gets. Given v, Z falls in size as u grows, and meets a half-integer in at most s sqrt(640 ln 2) + 1
< 22 s + 1 of the cells of u; given u, it meets at most 4 s R + 4 of them in cells of v, where E[R] < 1.26.
The computation itself is off by less than s 2^-370, which decides where a middle lies as close to a
half-integer, with a probability below (22 s + 2) 2^-320. So a number differs from round(Z) with probability
at most 64 (s + 1) 2^-320, for s up to 2^32 below 2^-281. All numbers that will ever be released, 2^70 say,
differ with a probability below ``ERROR``, which is added to delta. That the cipher's bits pass for random
ones is the same assumption as everywhere else.
"""

from __future__ import annotations

import math
import threading
from itertools import accumulate, pairwise

import mpmath  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from dptrain.core.entropy import Key
from dptrain.core.gaussian import ANGLES, FURTHER, RADII, Place
from dptrain.core.keystream import COUNTER_BYTES, Keystream, streams

ACCURACY = 2.0**-46
"""How far NumPy's functions may be off. It decides nothing but how often the long computation is made."""

ERROR = 2.0**-211
"""The largest distance in total variation between all that is drawn and true rounded Gaussians."""

SMALLEST, LARGEST = 1.0, 2.0**32
"""Standard deviations s that can be drawn. Below, noise would mostly be 0; above, e grows too large."""

_LARGEST_RADIUS = 5.0
_FURTHER_BITS = 256  # of u, and as many of v
_COUNTERS = 2 * _FURTHER_BITS // (8 * COUNTER_BYTES)
_PRECISION = 384  # bits of the long computation
_ONE_AT_A_TIME = threading.Lock()  # mpmath's tables of constants are everyone's

LARGEST_PARAMETER = 2 * 2**32 // _COUNTERS
"""Numbers of one parameter: the further bits of so many fill a stream."""


def streams_of(name: str) -> tuple[int, ...]:
    """A parameter's streams: none that its numbers in floating point come from."""
    return streams(f"{name}\0rounded", 3)


class RoundedGaussians:
    """Draws round(N(0, stddev^2)). One thread's own, with its scratch memory.

    Args:
        key: of the step.
        stddev: s, of the numbers before they are rounded, taken for exact.
        pairs: the most that are drawn at once.

    Raises:
        ValueError: s is not within `SMALLEST` and `LARGEST`.
    """

    def __init__(self, key: Key, stddev: float, pairs: int) -> None:
        check_stddev(stddev)
        self.most_pairs, self._stddev = pairs, stddev
        self._source = Keystream(key, 8 * pairs)
        self._words = np.empty(2 * pairs, np.uint64)
        self._numbers, self._scratch = np.empty(2 * pairs), np.empty(2 * pairs)
        self._long = mpmath.mp.clone()
        self._long.prec = _PRECISION

    def draw(self, places: list[Place]) -> list[npt.NDArray[np.int64]]:
        """The numbers of each place, ``[2, pairs]``: the first of each pair, then the second.

        They lie in scratch memory: use them before the next call.
        """
        ends = [0, *accumulate(place.pairs for place in places)]
        pairs = ends[-1]
        words = self._words[: 2 * pairs].reshape(2, pairs)
        for row, which in zip(words, (RADII, ANGLES)):
            buffer = row.data.cast("B")
            for place, begin, end in zip(places, ends, ends[1:]):
                first = place.streams[which] + place.first * 8 // COUNTER_BYTES
                self._source.fill(buffer[8 * begin : 8 * end], first)
        numbers = self._numbers[: 2 * pairs].reshape(2, pairs)
        doubtful = np.nonzero(self._fast(words, numbers))
        exact = []
        for row, i in zip(*(axis.tolist() for axis in doubtful)):
            radius, angle = (int(word) for word in words[:, i])
            which = next(k for k, end in enumerate(ends[1:]) if i < end)
            further = self._further(places[which], i - ends[which])
            exact.append(self._exactly(radius, angle, further)[row])
        integers = words.view(np.int64)  # the words have been used
        with np.errstate(invalid="ignore"):  # of what is replaced
            np.copyto(integers, numbers, casting="unsafe")
        integers[doubtful] = exact
        return [integers[:, begin:end] for begin, end in pairwise(ends)]

    def _fast(self, words: npt.NDArray[np.uint64], numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Put round(Z~) into ``numbers`` and say where that may not be round(Z), ``[2, pairs]``."""
        radii, bounds = self._scratch[: words.size].reshape(words.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.multiply(words[0], 2.0**-64, out=radii)
            np.log(radii, out=radii)
            np.abs(radii, out=radii)  # ln 1 = 0, and -0 would have a negative inverse
            radii *= 2
            np.sqrt(radii, out=radii)
            np.divide(1, radii, out=bounds)
            bounds += radii
            bounds *= 2.5 * ACCURACY * self._stddev
            bounds[radii > _LARGEST_RADIUS] = 1
            np.subtract(0.5, bounds, out=bounds)  # the distance from an integer up to which there is no doubt
            np.multiply(words[1].view(np.int64), 2 * math.pi * 2.0**-64, out=numbers[1])
            np.cos(numbers[1], out=numbers[0])
            np.sin(numbers[1], out=numbers[1])
            radii *= self._stddev
            numbers *= radii
            certain = np.empty(words.shape, bool)
            for row, here in zip(numbers, certain):
                nearest = np.rint(row, out=radii)
                row -= nearest
                np.abs(row, out=row)
                np.less_equal(row, bounds, out=here)
                row[:] = nearest
        return np.logical_not(certain, out=certain)

    def _further(self, place: Place, pair: int) -> tuple[int, int]:
        """The bits of u and of v that follow their first 64."""
        size = _FURTHER_BITS // 8
        bits = bytearray(2 * size)
        counter = (place.first + pair) * _COUNTERS
        self._source.fill(memoryview(bits), place.streams[FURTHER] + counter)
        return int.from_bytes(bits[:size], "little"), int.from_bytes(bits[size:], "little")

    def _exactly(self, radius: int, angle: int, further: tuple[int, int]) -> tuple[int, int]:
        """A pair from its first words and the bits that follow."""
        mp = self._long
        signed = angle - 2**64 if angle >= 2**63 else angle
        u, v = (
            mp.ldexp(2 * ((word << _FURTHER_BITS) + more) + 1, -65 - _FURTHER_BITS)
            for word, more in zip((radius, signed), further)
        )
        with _ONE_AT_A_TIME:
            length = self._stddev * mp.sqrt(-2 * mp.log(u))
            cosine, sine = mp.cos_sin(2 * mp.pi * v)
        return int(mp.nint(length * cosine)), int(mp.nint(length * sine))


def check_stddev(stddev: float) -> None:
    """Refuse a standard deviation, in units of the grid, that cannot be drawn.

    Raises:
        ValueError: it is not within `SMALLEST` and `LARGEST`.
    """
    if not SMALLEST <= stddev <= LARGEST:
        raise ValueError(
            f"rounded noise needs a standard deviation of 1 to 2^32 grid spacings, and has {stddev:g}: use a "
            "grid such as that of Mechanism.hardened()."
        )
