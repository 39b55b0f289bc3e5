"""Adversaries who see every noisy gradient, and know everything of a training but who took part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dptrain.audit.bounds import Array, Evidence
from dptrain.audit.canaries import Game
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import StepSpec


class Watching:
    """Scores of all canaries, step by step."""

    def __init__(self, game: Game, mechanism: Mechanism):
        self._game, self._mechanism = game, mechanism
        self._taken = 0
        self._log_ratio = np.zeros(game.canaries)
        self._total = np.zeros(game.canaries)
        self._squares = np.zeros(game.canaries)
        self._digits = np.zeros(game.canaries)

    def see(self, along: Array) -> None:
        """The noisy sum of a step along each canary's gradient, ``[m]`` in clip norms."""
        spec = self._mechanism.step(self._taken)
        self._log_ratio += log_likelihood_ratio(along, spec)
        self._total += along
        self._squares += along**2
        self._digits += low_digits(along, spec.sensitivity)
        self._taken += 1

    def evidence(self) -> list[Evidence]:
        """What each adversary has to say.

        The exact likelihood ratio has no better where the mechanism is what it is said to be. The others are
        for mechanisms that are not: some canaries by themselves; how much a canary's values differ from
        step to step, which noise that repeats itself does not hide; and their low digits, which noise of few
        digits does not.
        """
        game = self._game
        plain = game.alone & ~game.repeated
        found = [self._of("likelihood ratio", self._log_ratio)]
        groups = {
            "one layer": plain,
            "one layer, used several times": game.repeated,
            "all layers": ~game.alone,
        }
        for name, some in groups.items():
            if some.any():
                found.append(self._of(f"likelihood ratio, {name}", self._log_ratio, some))
        if self._taken > 1:
            found.append(self._of("spread over the steps", self._squares - self._total**2 / self._taken))
        found.append(self._of("low digits", self._digits, game.alone))
        return found

    def _of(self, adversary: str, scores: Array, some: Any = slice(None)) -> Evidence:
        return Evidence(adversary, scores[some], self._game.present[some])

    def of_final_weights(self) -> Evidence:
        """By the sum of all steps, which is what the last weights tell of the first."""
        return Evidence("final weights", self._total, self._game.present)


def log_likelihood_ratio(along: Array, spec: StepSpec) -> Array:
    """Of "took part in this training" to "did not", for what one step shows along a canary.

    ``log(1 - q + q exp((2 y - 1) / (2 σ²)))``: with probability q a sample adds 1 to Gaussian noise of
    standard deviation σ.
    """
    with np.errstate(divide="ignore"):
        absent = np.log1p(-spec.sample_rate)
    sampled = np.log(spec.sample_rate) + (2 * along - 1) / (2 * spec.noise_multiplier**2)
    return np.logaddexp(absent, sampled)


def low_digits(along: Array, clip_norm: float) -> Array:
    """How much more a value looks like a number of bfloat16 with a clipped gradient taken off than as it is.

    Noise that was rounded to few digits lies on a grid, and a gradient that is added in more digits moves it
    off (Mironov 2012, "On significance of the least significant bits for differential privacy").
    """
    with np.errstate(invalid="ignore"):
        return _off_the_grid(clip_norm * along) - _off_the_grid(clip_norm * (along - 1))


def _off_the_grid(values: Array) -> Array:
    """The distance to the nearest number of bfloat16, from 0 to about 1 in its digits."""
    nearest = torch.from_numpy(values).bfloat16().double().numpy()
    return np.minimum(np.abs(values - nearest) / np.maximum(np.abs(values), 1e-30) * 2**9, 1)
