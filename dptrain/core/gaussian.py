"""Gaussian numbers from a cryptographic keystream, each at a place of its own.

The numbers of a parameter come in blocks of ``BLOCK``, those of a block in pairs. Any run of pairs can be
drawn by itself, on any thread and any device: what it holds is decided by the key, the parameter's name and
the pairs' places.
"""

from __future__ import annotations

import math
from bisect import bisect
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from dptrain.core.entropy import Key
from dptrain.core.keystream import COUNTER_BYTES, Keystream, streams

BLOCK = 2**19  # numbers: long enough between two turns at Python's lock, scratch that fits a cache

RADII, ANGLES, FURTHER = range(3)  # streams of a parameter

_SMALL = 2**14  # words of 32 bits below it, 1 in 2^18, get 32 further bits
_WORDS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.uint64),
}


ALIGNMENT = 4  # pairs: a counter's bytes hold so many words of 32 bits

PAIRS = BLOCK // 2  # of a block


class Place(NamedTuple):
    """Where a run of pairs of a parameter comes from."""

    streams: tuple[int, ...]  #: of the parameter, as ``streams_of`` gives them
    first: int  #: pair, a multiple of ``ALIGNMENT``; block n begins with pair n ``PAIRS``
    pairs: int  #: how many, at most ``PAIRS``


@lru_cache(maxsize=2**16)
def streams_of(name: str) -> tuple[int, ...]:
    """A parameter's streams: of radii, of angles, of further bits for radii."""
    return streams(name, 3)


class Gaussians:
    """Draws N(0, stddev^2). One thread's own, with its scratch memory.

    The transform of Box and Muller (1958, "A note on the generation of random normal deviates"):
    for independent uniform u in (0, 1] and v, ``sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v)`` are two
    independent standard normal numbers.

    v has 32 random bits in float32 and 64 in float64. u has 64, of which float32 draws the lower 32
    only where the upper ones are below 2^14, for radii above 5: elsewhere it has next to no digits
    for them. So radii end at sqrt(-2 ln 2^-65) = 9.49, where 24 bits, as generators in float32 mostly
    have them, end at 5.77. What that means for delta is in docs/noise.md.

    Args:
        key: of the step.
        dtype: float32 or float64.
        stddev: of each number.
        pairs: the most that are drawn at once.
    """

    def __init__(self, key: Key, dtype: np.dtype, stddev: float, pairs: int) -> None:
        self.most_pairs = pairs
        self._dtype, self._word, self._bits = dtype, _WORDS[dtype], 8 * dtype.itemsize
        # -2 ln u = 2 ln 2 log2(1 / u)
        self._scale = dtype.type(stddev * math.sqrt(2 * math.log(2)))
        self._turn = dtype.type(2 * math.pi * 2.0**-self._bits)
        self._source = Keystream(key, pairs * dtype.itemsize)
        self._words, self._numbers = np.empty(2 * pairs, self._word), np.empty(2 * pairs, dtype)

    def draw(self, places: list[Place]) -> list[np.ndarray]:
        """The numbers of each place, ``[2, pairs]``: the first of each pair, then the second.

        They lie in scratch memory: use them before the next call.
        """
        ends = [0, *accumulate(place.pairs for place in places)]
        words = self._words[: 2 * ends[-1]].reshape(2, -1)
        size = self._dtype.itemsize
        for row, which in zip(words, (RADII, ANGLES)):
            buffer = row.data.cast("B")
            for place, begin, end in zip(places, ends, ends[1:]):
                first = place.first * size // COUNTER_BYTES
                self._source.fill(buffer[begin * size : end * size], place.streams[which] + first)
        radii, angles = self._numbers[: words.size].reshape(2, -1)
        self._inverse_uniform(words[0], places, ends, out=radii)
        np.log2(radii, out=radii)
        np.sqrt(radii, out=radii)
        radii *= self._scale
        np.multiply(words[1].view(f"i{self._word.itemsize}"), self._turn, **self._into(angles))
        turned = words.view(self._dtype)  # the words have been used
        np.cos(angles, out=turned[0])
        np.sin(angles, out=turned[1])
        turned *= radii
        return [turned[:, begin:end] for begin, end in pairwise(ends)]

    def _inverse_uniform(
        self, words: np.ndarray, places: list[Place], ends: list[int], out: np.ndarray
    ) -> None:
        """1 / u, ``[pairs]``, for u in (0, 1]."""
        further: dict[int, float] = {}
        if self._bits == 64:
            words |= self._word.type(1)  # the middles of 2^63 cells: never 0
        elif np.minimum.reduce(words) < _SMALL:
            further = self._further(words, places, ends)
            words[list(further)] = 1
        np.divide(self._dtype.type(2.0**self._bits), words, **self._into(out))
        for i, value in further.items():
            out[i] = value

    def _further(self, words: np.ndarray, places: list[Place], ends: list[int]) -> dict[int, float]:
        """1 / u where words are small, from 64 bits: the middles of 2^64 cells."""
        found = {}
        lower = memoryview(bytearray(4))
        for i in np.flatnonzero(words < _SMALL).tolist():
            which = bisect(ends, i) - 1
            place = places[which]
            self._source.fill(lower, place.streams[FURTHER] + place.first + i - ends[which])
            found[i] = 2.0**64 / (int(words[i]) * 2**32 + int.from_bytes(lower, "little") + 0.5)
        return found

    def _into(self, out: np.ndarray) -> dict[str, Any]:
        """Arguments for a ufunc that reads integers and computes in the type of ``out``."""
        return {"out": out, "dtype": self._dtype, "casting": "unsafe"}
