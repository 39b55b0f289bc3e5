"""One call of a clipped gradient, flattened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax import Array


@dataclass(frozen=True, eq=False)
class Call:
    """Leaves of the arguments by what they are.

    Attributes:
        parameters, data, others: leaves; those of the data have the examples leading.
        loss: from ``(parameters, data of one example, others)`` to ``[scalar, *aux leaves]``.
        names: of the parameters, for messages.
        thresholds: of the clip rule's parts, ``[parts]``.
    """

    parameters: list[Array]
    data: list[Array]
    others: list[Array]
    loss: Callable[[Sequence, Sequence, Sequence], list]
    names: list[str]
    thresholds: Array

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return self.data[0].shape[0]
