"""Canaries whose clipped gradients are orthogonal: each is a trial of its own, thousands in one run.

A canary has one column of x and one row of y, so that in each of the K layers (``dptrain.audit.linear``) a
single element is its own, in one of two ways:

- *one layer*: the K canaries of a place have a layer each. Where a layer's norm is left out, they are not
  clipped; where a layer that is used several times has the norms of its uses added, to too much.
- *all layers*: the K - 1 canaries of a place have ``±1/√K`` in each, in rows of a Hadamard matrix that sum to
  0. Where layers are clipped one by one, their norm is √K times what it may be; where layers share their
  noise, it cancels.

All are loud, so that the clip norm is what bounds them. Ordinary examples use columns of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import hadamard

from dptrain.audit.bounds import Array
from dptrain.audit.linear import FIRST_REPEATED, LAYERS, NAMES, Float32, LinearProblem
from dptrain.core.entropy import Key

LOUDNESS = 10.0  # clip norms
ORDINARY = 256
SPARE_COLUMNS = 8


@dataclass(frozen=True, eq=False)
class Game(LinearProblem):
    """A training whose data hold some of m canaries, as fair coins will have it, and ordinary examples.

    Attributes:
        canaries: m.
        clip_norm: C.
        key: of the coins and of ordinary examples.
        repeats: how often the later half of the layers is used.
    """

    canaries: int
    clip_norm: float
    key: Key
    repeats: int = 1

    # Canaries: the first half of them has one layer each, the second half all layers.

    @cached_property
    def alone(self) -> npt.NDArray[np.bool_]:
        """bool ``[m]``: those of one layer."""
        return np.arange(self.canaries) < (self.canaries + 1) // 2

    @cached_property
    def repeated(self) -> npt.NDArray[np.bool_]:
        """bool ``[m]``: those of one layer that is used several times."""
        return self.alone & (np.arange(self.canaries) % LAYERS >= FIRST_REPEATED) & (self.repeats > 1)

    @cached_property
    def _place(self) -> npt.NDArray[np.int64]:
        """``[m]``: several canaries share a place, in directions of their own."""
        number = np.arange(self.canaries)
        first = int(self.alone.sum())
        return np.where(self.alone, number // LAYERS, -(-first // LAYERS) + (number - first) // (LAYERS - 1))

    @cached_property
    def rows(self) -> int:
        """Of each layer; about as many as columns."""
        return math.isqrt(int(self._place[-1])) + 1

    @cached_property
    def columns(self) -> int:
        """Of each layer, those of ordinary examples among them."""
        return int(self._place[-1]) // self.rows + 1 + SPARE_COLUMNS

    @cached_property
    def _directions(self) -> Array:
        """``[m, K]``, orthonormal where places are equal."""
        number = np.arange(self.canaries)
        contrasts = hadamard(LAYERS)[1:] / math.sqrt(LAYERS)
        spread = contrasts[(number - int(self.alone.sum())) % (LAYERS - 1)]
        return np.where(self.alone[:, None], np.eye(LAYERS)[number % LAYERS], spread)

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """bool ``[m]``: a fair coin for each."""
        return self.key.child("coins").numpy_generator().random(self.canaries) < 0.5

    def observed(self, sums: Mapping[str, Array]) -> Array:
        """``[m]``: noisy sums of gradients along each canary, in clip norms."""
        stacked = np.stack([np.asarray(sums[name], np.float64) for name in NAMES])
        at_place = stacked[:, self._place % self.rows, self._place // self.rows]
        return np.einsum("mk,km->m", self._directions, at_place) / self.clip_norm

    # Examples: canaries that are present come first, for it is the first example that padding repeats.

    @cached_property
    def _members(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.present)

    @property
    def size(self) -> int:
        """Of the data set."""
        return len(self._members) + ORDINARY

    def inputs(self, indices: Any) -> Float32:
        """x ``[B, columns]`` of some examples."""
        canary, index = self._split(indices)
        x = np.zeros((len(canary), self.columns), np.float32)
        x[canary, self._place[index[canary]] // self.rows] = 1
        x[~canary, -SPARE_COLUMNS:] = self._ordinary[0][index[~canary]]
        return x

    def targets(self, indices: Any) -> Float32:
        """y ``[B, K, rows]`` of some examples."""
        canary, index = self._split(indices)
        y = np.zeros((len(canary), LAYERS, self.rows), np.float32)
        members = index[canary]
        y[canary, :, self._place[members] % self.rows] = LOUDNESS * self.clip_norm * self._directions[members]
        y[~canary] = self._ordinary[1][index[~canary]]
        return y

    def _split(self, indices: Any) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which are canaries, and their numbers among canaries or ordinary examples."""
        indices = np.asarray(indices)
        canary = indices < len(self._members)
        number = indices - len(self._members)
        number[canary] = self._members[indices[canary]]
        return canary, number

    @cached_property
    def _ordinary(self) -> tuple[Float32, Float32]:
        """x in the spare columns and y of each, whose gradients have norms from C / 3 to 3 C."""
        rng = self.key.child("ordinary").numpy_generator()
        x = rng.standard_normal((ORDINARY, SPARE_COLUMNS), np.float32)
        y = rng.standard_normal((ORDINARY, LAYERS, self.rows), np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        norms = self.clip_norm * np.geomspace(1 / 3, 3, ORDINARY)
        y *= (norms / np.linalg.norm(y, axis=(1, 2))).astype(np.float32)[:, None, None]
        return x, y
