"""Neighbouring data sets in which faults show that the crowd hides.

Differential privacy is a promise about all data sets. So beside an ordinary one there are some that nobody
has. In each the canary comes first, where padding of physical batches takes its rows from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dptrain.audit.linear import LAYERS, NAMES, Float32, LinearProblem
from dptrain.audit.subjects import Weights
from dptrain.core.entropy import Key

LOUDNESS = 10.0  # clip norms
#: as many as rows in a physical batch: the canary, if it is sampled with them all, begins another; and an odd
#: number, so that half of them and the canary are, rounded up, no more than half of them
OTHERS = 15
PHYSICAL_BATCH_SIZE = OTHERS


@dataclass(frozen=True, eq=False)
class Cloud:
    """Logistic regression, the last layer that most fine-tuning trains, with the canary or without.

    Ordinary examples are clouds of points. The canary is none of them: it has a feature that no other example
    uses.
    """

    present: bool
    clip_norm: float
    key: Key
    ordinary: int = 100

    FEATURES, CLASSES, LOUD = 16, 4, 8.0

    @property
    def size(self) -> int:
        return self.ordinary + self.present

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.key.child("clouds").numpy_generator()
        labels = np.arange(self.ordinary) % self.CLASSES
        x = rng.standard_normal((self.ordinary, self.FEATURES), np.float32)
        x += 2 * rng.standard_normal((self.CLASSES, self.FEATURES), np.float32)[labels]
        x[:, 0] = 0
        first = slice(0 if self.present else 1, None)
        return np.concatenate([self.canary()[None], x])[first], np.concatenate([[0], labels])[first]

    @classmethod
    def canary(cls) -> Float32:
        """``[FEATURES]``; its label is 0."""
        return cls.LOUD * np.eye(1, cls.FEATURES, dtype=np.float32)[0]

    def inputs(self, indices: Any) -> np.ndarray:
        """``[B, FEATURES]``."""
        return self._data[0][np.asarray(indices)]

    def targets(self, indices: Any) -> np.ndarray:
        """Labels ``[B]``."""
        return self._data[1][np.asarray(indices)]

    def torch_model(self) -> nn.Module:
        model = nn.Linear(self.FEATURES, self.CLASSES)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    @staticmethod
    def torch_loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def jax_params(self) -> Weights:
        zeros = {"weight": (self.CLASSES, self.FEATURES), "bias": (self.CLASSES,)}
        return {name: np.zeros(shape, np.float32) for name, shape in zeros.items()}

    @staticmethod
    def jax_loss(params: Any, example: Any) -> Any:
        import jax

        x, label = example
        return -jax.nn.log_softmax(params["weight"] @ x + params["bias"])[label]

    def scores(self, moved: Weights, unit: float) -> dict[str, float]:
        """How little loss the canary has under weights that began at zero."""
        scores = np.asarray(moved["weight"], np.float64) @ self.canary() + moved["bias"]
        return {"its loss": float(scores[0] - np.logaddexp.reduce(scores))}


@dataclass(frozen=True, eq=False)
class Few(LinearProblem):
    """A few examples with gradients made to measure, with the canary or without.

    Attributes:
        others: x ``[n, columns]`` and y ``[n, LAYERS, rows]``.
        canary: its x ``[columns]``; its y is loud, in the first row of the first layer.
    """

    present: bool
    clip_norm: float
    others: tuple[Float32, Float32]
    canary: Float32

    rows, columns, repeats = 50, 50, 1

    @property
    def size(self) -> int:
        return len(self.others[0]) + self.present

    @cached_property
    def _data(self) -> tuple[Float32, Float32]:
        first = slice(0 if self.present else 1, None)
        y = np.zeros((1, LAYERS, self.rows), np.float32)
        y[0, 0, 0] = LOUDNESS * self.clip_norm
        return (
            np.concatenate([self.canary[None], self.others[0]])[first],
            np.concatenate([y, self.others[1]])[first],
        )

    def inputs(self, indices: Any) -> Float32:
        return self._data[0][np.asarray(indices)]

    def targets(self, indices: Any) -> Float32:
        return self._data[1][np.asarray(indices)]

    def scores(self, moved: Weights, unit: float) -> dict[str, float]:
        """How far the weights went along the canary's gradient, and how far in all, either of which may tell.

        Args:
            unit: what a clipped gradient moves them by.
        """
        all_of_them = np.concatenate([np.asarray(moved[name], np.float64).ravel() for name in NAMES])
        along = -float(moved[NAMES[0]][0, 0]) / unit
        length = float(np.linalg.norm(all_of_them[1:]))
        return {"its direction": along, "much noise": length, "little noise": -length}


def opposed(present: bool, clip_norm: float, key: Key) -> Few:
    """All others have the opposite gradient: who displaces one of them, or counts among them, moves the sum
    twice as far."""
    x, y = _blank()
    x[:, 0] = 1
    y[:, 0, 0] = -LOUDNESS * clip_norm
    return Few(present, clip_norm, (x, y), x[0])


def lonely(present: bool, clip_norm: float, key: Key) -> Few:
    """No other has a gradient at all."""
    x, y = _blank()
    x[:, 1] = 1
    return Few(present, clip_norm, (x, y), np.eye(1, Few.columns, dtype=np.float32)[0])


def not_finite(present: bool, clip_norm: float, key: Key) -> Few:
    """The canary's gradient is not a number."""
    x, y = _blank()
    rng = key.child("others").numpy_generator()
    x += rng.standard_normal(x.shape, np.float32)
    y += rng.standard_normal(y.shape, np.float32)
    return Few(present, clip_norm, (x, y), np.full(Few.columns, np.nan, np.float32))


def _blank() -> tuple[Float32, Float32]:
    return np.zeros((OTHERS, Few.columns), np.float32), np.zeros((OTHERS, LAYERS, Few.rows), np.float32)


@dataclass(frozen=True)
class Scene:
    """Two neighbouring data sets.

    Attributes:
        make: of whether the canary is present, the clip norm and a key for whatever is drawn.
        sample_rate: where it takes another than is asked for.
        learning_rate: of gradient descent.
    """

    make: Callable[[bool, float, Key], Any]
    sample_rate: float | None = None
    learning_rate: float = 1.0


#: by whom the canary is with
SCENES: dict[str, Scene] = {
    # slow, so that the canary's loss moves as its gradient says: in proportion
    "among many": Scene(Cloud, learning_rate=0.25),
    "against all": Scene(opposed),
    "against all, always sampled": Scene(opposed, sample_rate=1.0),
    "by itself": Scene(lonely),
    "not a number": Scene(not_finite),
}
