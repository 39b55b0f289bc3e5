"""One way of training that takes part in a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dptrain.core.mechanism import Mechanism


class Unsupported(RuntimeError):
    """This way of training does not exist, is not installed or says itself that it does not do this."""


class Sized(Protocol):
    """What a task has in either framework."""

    @property
    def clip_norm(self) -> float: ...

    @property
    def logical_batch_size(self) -> int: ...


def accounted(task: Sized) -> Mechanism:
    """Some mechanism of the task's clip norm and logical batch: what noise costs depends on nothing else."""
    return Mechanism.constant(
        noise_multiplier=1.0,
        clip_norm=task.clip_norm,
        sample_rate=0.1,
        steps=10_000,
        expected_batch_size=task.logical_batch_size,
    )


@dataclass
class Contestant:
    """One way of training one model on one batch.

    Attributes:
        step: takes a physical step; gradients are accumulated. It waits for the device.
        end: the rest of a logical step: noise, optimizer, gradients back to zero. It waits for the device.
        clipped_sum: for the private ones, the sum of the clipped gradients of the batch's first n
            examples, without noise, by parameter name; a parameter that is left out is missing or None.
        stabiliser: what a peer documents to add to the norm in ``min(1, C / (norm + stabiliser))``.
        held_bytes: memory for per-example gradients that it keeps from step to step.
        ends_with_a_step: the end begins with the last physical step, so that what goes to other devices can
            go meanwhile; the time of a later step is then taken off.
        first_s, later_s, end_s: seconds of the first physical step of a logical one, of a later one, and of
            the end, one of each for a round.
    """

    name: str
    role: Literal["case", "baseline"]
    step: Callable[[], None]
    end: Callable[[], None]
    clipped_sum: Callable[[int], dict[str, Any]] | None = None
    stabiliser: float = 0.0
    held_bytes: Callable[[], int] = int
    ends_with_a_step: bool = False
    first_s: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0
