"""Small problems whose per-example gradients are written out in float64, for no engine to get wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Problem(Protocol):
    """Examples, weights, and what the gradients are.

    Attributes:
        data: arrays with the examples leading, ``[N, ...]``.
        weights: to begin with, float32.
    """

    data: Arrays
    weights: Arrays

    def gradients(self, weights: Arrays) -> Arrays:
        """Per-example gradients ``[N, *weight]``, float64."""
        ...


@dataclass
class Autoencoder:
    """``x -> tanh(x W + b) W^T + c``: a matrix that is used twice, one that is used once, and a parameter
    that few examples touch.

    The loss is ``||output - x||^2 / 2 + ||x S||^2 / 2 + t sum(r)``.
    """

    size: int = 24
    features: int = 8
    hidden: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=(self.size, self.features)) * np.geomspace(0.2, 3, self.size)[::-1, None]
        t = np.where(np.arange(self.size) == 3, 2.0, 0.0)
        self.data: Arrays = {"x": x.astype(np.float32), "t": t.astype(np.float32)}
        w = rng.normal(size=(self.features, self.hidden)) / self.hidden
        shapes = {"b": self.hidden, "c": self.features, "r": 3}
        s = rng.normal(size=(self.features, 4)) / self.features
        self.weights: Arrays = {"w": w.astype(np.float32), "s": s.astype(np.float32)}
        self.weights |= {name: np.zeros(size, np.float32) for name, size in shapes.items()}

    def gradients(self, weights: Arrays) -> Arrays:
        w, b, c, s = (weights[name].astype(np.float64) for name in "wbcs")
        x, t = (self.data[name].astype(np.float64) for name in "xt")
        with np.errstate(all="ignore"):
            h = np.tanh(x @ w + b)
            e = h @ w.T + c - x
            dz = (e @ w) * (1 - h**2)
            dw = x[:, :, None] * dz[:, None, :] + e[:, :, None] * h[:, None, :]
            ds = x[:, :, None] * (x @ s)[:, None, :]
            return {"w": dw, "b": dz, "c": e, "s": ds, "r": np.repeat(t[:, None], 3, 1)}

    def replaced(self, rows: dict[int, Arrays]) -> Autoencoder:
        """The same problem with other examples at these indices."""
        other = Autoencoder(self.size, self.features, self.hidden, self.seed)
        for index, example in rows.items():
            for name, value in example.items():
                other.data[name][index] = value
        return other


@dataclass
class Softmax:
    """Multinomial logistic regression, as ``--model linear`` is."""

    images: np.ndarray  #: [N, features] float32
    labels: np.ndarray  #: [N] int
    weights: Arrays  #: head.weight [classes, features], head.bias [classes]

    @cached_property
    def data(self) -> Arrays:
        return {"x": self.images, "y": self.labels}

    def gradients(self, weights: Arrays) -> Arrays:
        x = self.images.astype(np.float64)
        logits = x @ weights["head.weight"].astype(np.float64).T + weights["head.bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(p)), self.labels] -= 1
        return {"head.weight": p[:, :, None] * x[:, None, :], "head.bias": p}


def flat(arrays: Arrays, leading: int = 0) -> np.ndarray:
    """All of them in one vector, by name: ``[*leading, P]``, float64."""
    parts = [arrays[name].astype(np.float64) for name in sorted(arrays)]
    return np.concatenate([p.reshape(*p.shape[:leading], -1) for p in parts], -1)


def clipped_gradients(problem: Problem, weights: Arrays, clip_norm: float) -> np.ndarray:
    """``[N, P]``: what each example adds to a sum; nothing where its gradient is not finite."""
    gradients = flat(problem.gradients(weights), 1)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(gradients, axis=1)
        clipped = gradients * np.minimum(1, clip_norm / norms)[:, None]
        # What overflows in float32, in which the engines compute, is not finite for them.
        finite = np.isfinite(norms.astype(np.float32) ** 2)
    return np.where((finite & (norms > 0))[:, None], clipped, 0.0)
