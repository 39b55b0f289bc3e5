"""What training asks of a data set, and the errors that data sets raise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

Inputs = torch.Tensor | dict[str, torch.Tensor]
"""Images or features [B, *input_shape] float32; or, of texts, tensors [B, *input_shape] int64 by name
(`input_ids`, `attention_mask`, ...)."""

Batch = tuple[Inputs, torch.Tensor]
"""Inputs and labels [B] int64, on the compute device."""


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

    def stand_in(self, size: int) -> Batch:
        """A batch of `size` rows like those of `gather`, made without looking at any example."""
        ...


def blank(size: int, input_shape: tuple[int, ...], device: torch.device) -> Batch:
    """The stand-in of images and features: zeros [size, *input_shape] and labels 0."""
    return torch.zeros(size, *input_shape, device=device), torch.zeros(size, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Splits:
    """Training examples (private) and examples to evaluate on (never trained on)."""

    train: Dataset
    test: Dataset | None
    """None if the data set comes without."""
    test_name: str = "test"
    """What the examples to evaluate on are called."""
    public: Dataset | None = None
    """Examples that the user has declared public; no private one is among them."""

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.train.input_shape
