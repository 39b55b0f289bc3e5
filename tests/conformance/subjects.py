"""What is put to the test: ways of taking private steps through the public interface.

A subject takes the steps of a task, and tells what was released and what it said meanwhile. Nothing of
dptrain's inside is looked at: a release is what reaches the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

from .problems import Arrays, Problem


@dataclass(frozen=True)
class Task:
    problem: Problem
    mechanism: Mechanism
    physical_batch_size: int
    seed: int | None = None  #: None: from the operating system's entropy


def secret(task: Task) -> Key:
    """The key of a task, where a subject takes one."""
    return Key.from_entropy() if task.seed is None else Key.from_seed(task.seed)


@dataclass
class Run:
    """What was seen of a run.

    Attributes:
        weights: before each step.
        releases: by step, what reached the optimizer.
        told: what each step said besides epsilon.
        epsilon: stated at the end; None if the mechanism has no delta.
    """

    weights: list[Arrays] = field(default_factory=list)
    releases: list[Arrays] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    epsilon: float | None = None


class Subject(Protocol):
    slack: float  #: L over q N

    def problem(self) -> Problem:
        """Ordinary examples."""
        ...

    def run(self, task: Task) -> Run:
        """Take the steps of the task's mechanism."""
        ...


class Engine(Subject, Protocol):
    """A subject whose parts can be called one by one."""

    def clipped(self, problem: Problem, clip_norm: float) -> Callable[[np.ndarray], Arrays]:
        """From a mask ``[N]`` to the clipped sum of these examples."""
        ...

    def release(self, problem: Problem, clip_norm: float, method: str, mechanism: Mechanism) -> Arrays:
        """A sum clipped by ``method`` to ``clip_norm``, released under a mechanism that may not fit it."""
        ...
