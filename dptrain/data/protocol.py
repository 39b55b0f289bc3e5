"""What training asks of a data set, and the errors that data sets raise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs [B, *input_shape] float32, labels [B] int64, both on the compute device."""


class DataError(ValueError):
    """The data cannot be used. The message says what was wrong and what to do."""


@runtime_checkable
class Dataset(Protocol):
    """A labelled data set addressed by index: a Poisson batch is one `gather`.

    The privacy unit is one index.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, ...]
    """Shape of one input as the model receives it, for example (channels, height, width)."""

    def __len__(self) -> int: ...

    def gather(self, indices: torch.Tensor) -> Batch:
        """The examples at `indices` [B] int64, in that order, repeats allowed."""
        ...

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """`gather` for each element of a lazy sequence of index tensors, possibly read ahead."""
        ...

    def subset(self, indices: torch.Tensor) -> Dataset:
        """The data set that holds only the examples at `indices` [M] int64."""
        ...


@dataclass(frozen=True)
class Splits:
    """Training examples (private) and test examples (never trained on)."""

    train: Dataset
    test: Dataset

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.train.input_shape
