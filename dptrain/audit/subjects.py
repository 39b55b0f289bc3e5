"""What is audited: our engines by clipping method, and other libraries, each as something that trains.

A subject is handed a problem (data and a loss) and gives the weights after every step of plain gradient
descent: what an adversary who sees all of a training sees, since noisy gradients are differences of weights.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from dptrain.bench.contestant import Unsupported
from dptrain.bench.peers import PEERS
from dptrain.core import methods
from dptrain.core.mechanism import Mechanism

Weights = Mapping[str, npt.NDArray[np.float32]]
ENGINES = ("torch", "jax")


class Problem(Protocol):
    """Data and a loss, for every framework; gradients are of the parameters that `torch_model` has."""

    @property
    def size(self) -> int:
        """Of the data set."""

    def inputs(self, indices: Any) -> npt.NDArray[Any]:
        """Of some examples, which lead."""

    def targets(self, indices: Any) -> npt.NDArray[Any]:
        """Of the same."""

    def torch_model(self) -> nn.Module:
        """Always with the same weights."""

    def torch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """``[B]``, of a pair of inputs and targets."""

    def jax_params(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """The weights of `torch_model`, by its names."""

    def jax_loss(self, params: Any, example: Any) -> Any:
        """Of one example."""


@dataclass(frozen=True)
class Training:
    """How a subject is to train.

    Attributes:
        mechanism: what is promised: sampling, clipping and noise of every step.
        learning_rate: of gradient descent on the noisy mean gradient.
        physical_batch_size: examples computed at once.
        device: cpu, cuda, cuda:1.
    """

    mechanism: Mechanism
    learning_rate: float = 1.0
    physical_batch_size: int = 256
    device: str = "cpu"


def for_batches_of(mechanism: Mechanism, expected_batch_size: float) -> Mechanism:
    """The same mechanism with another L."""
    return dataclasses.replace(
        mechanism,
        segments=tuple(
            (dataclasses.replace(spec, expected_batch_size=expected_batch_size), count)
            for spec, count in mechanism.segments
        ),
    )


class Subject(Protocol):
    """Something that claims to train privately."""

    name: str

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        """The weights at the beginning and after every step.

        Sampling and noise come from the entropy that the subject takes for itself: predictable entropy is a
        fault that an audit is to find.

        Raises:
            Unsupported: it is not here, or says that it does not do this.
        """

    def for_many_trainings(self) -> Subject:
        """Itself, or what does the same and compiles only once."""


def subject(engine: str, method: str) -> Subject:
    """An engine of ours by clipping method, or a peer by its mode.

    Raises:
        ValueError: there is none; the message says what there is.
        Unsupported: what it needs is not installed.
    """
    check(engine, method)
    if engine == "jax" and importlib.util.find_spec("jax") is None:
        raise Unsupported("JAX is not installed: pip install 'dptrain[jax]'.")
    if engine in ENGINES:
        module = importlib.import_module(f"dptrain.audit.{engine}_subject")
        return module.Engine(methods.resolve(method).name)
    module = importlib.import_module(f"dptrain.audit.{PEERS[engine].framework}_peer")
    return module.Library(PEERS[engine], PEERS[engine].mode(method))


def check(engine: str, method: str) -> None:
    """Raises ValueError for an engine or a method that there is not, or that is not private."""
    if engine in PEERS:
        PEERS[engine].mode(method)
    elif engine not in ENGINES:
        known = ", ".join([*ENGINES, *PEERS])
        raise ValueError(f"there is no engine {engine!r} to audit; choose from {known}.")
    elif not methods.resolve(method).is_private:
        raise ValueError(f"method {method!r} adds no noise and claims no epsilon: there is nothing to audit.")
