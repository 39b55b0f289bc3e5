"""A data set that stays in many files and is read by index, no further than a batch needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import Batch, DataError, blank
from dptrain.data.read_ahead import read_ahead

Rows = npt.NDArray[np.int64]

AHEAD = 2
"""Physical batches that may be under way or waiting, for each thread."""
MOST_LABELS = 2**28
"""How many labels are ever held in memory at once: 2 GiB."""


class Shard(Protocol):
    """One file of examples. May be read by several threads at once."""

    path: str
    size: int
    """Number of examples, at least 1."""
    stored_shape: tuple[int, ...]
    """Of one example as `read` gives it."""
    is_image: bool
    """Whether examples are uint8 images [C, H, W], to be preprocessed, or float32 inputs as they are."""
    num_classes: int | None
    """As the file states it; None if it does not."""

    def read(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [k, *stored_shape] and labels [k] int64 of `rows` [k], ascending. Raises DataError."""
        ...

    def labels(self) -> torch.Tensor:
        """All labels [size] int64. Raises DataError."""
        ...


class Sharded:
    """The examples of all shards, one after another, under one index.

    What is in memory is one offset per shard and the batches that threads read ahead, whatever the number of
    examples; of a subset, its indices.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        num_classes: int,
        preprocess: Preprocess,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        chosen: Rows | None = None,
    ) -> None:
        """shards: at least one, all of one shape and kind. workers: threads; None: one per core, up to 8.
        chosen: the indices over all shards that this data set has, if not all."""
        self.name = name
        self.num_classes = num_classes
        self.preprocess = preprocess
        self.device = torch.device(device)
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        self._shards = shards
        self._ends = np.cumsum([shard.size for shard in shards], dtype=np.int64)
        self._chosen = chosen
        stored = shards[0].stored_shape
        self._is_image = shards[0].is_image
        self.input_shape: tuple[int, ...] = preprocess.output_shape(stored) if self._is_image else stored

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._chosen is None else len(self._chosen)

    @property
    def labels(self) -> torch.Tensor:
        """All labels [N] int64, read from all shards: training does not need them."""
        if self._ends[-1] > MOST_LABELS:
            raise DataError(
                f"{self.name}: the labels of {self._ends[-1]:,} examples would have to be in memory at once, "
                "for --validation-fraction for example; put examples to evaluate on into a folder test/."
            )
        every = torch.cat([checked(shard, shard.labels(), self.num_classes) for shard in self._shards])
        return every if self._chosen is None else every[torch.from_numpy(self._chosen)]

    def gather(self, indices: torch.Tensor) -> Batch:
        return self._finish(self._read(indices))

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Batches in order; threads read `AHEAD` batches each ahead."""
        for batch in read_ahead(self._read, indices, self.workers, AHEAD * self.workers):
            yield self._finish(batch)

    def subset(self, indices: torch.Tensor) -> Sharded:
        chosen = indices.cpu().numpy().astype(np.int64, copy=False)
        if self._chosen is not None:
            chosen = self._chosen[chosen]
        return Sharded(
            self.name, self._shards, self.num_classes, self.preprocess, self.device, self.workers, chosen
        )

    def stand_in(self, size: int) -> Batch:
        return blank(size, self.input_shape, self.device)

    def _read(self, indices: torch.Tensor) -> Batch:
        """The examples as they are stored, in host memory."""
        at = indices.cpu().numpy()
        if len(at) and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"{self.name} has {len(self):,} examples; an index lies outside of them.")
        at = at if self._chosen is None else self._chosen[at]
        wanted, back = np.unique(at, return_inverse=True)
        holders = np.searchsorted(self._ends, wanted, side="right")
        first = self._shards[0]
        parts = [
            (torch.empty(0, *first.stored_shape, dtype=_dtype(first)), torch.empty(0, dtype=torch.int64))
        ]
        for holder in np.unique(holders):
            shard = self._shards[holder]
            inputs, labels = shard.read(wanted[holders == holder] - (self._ends[holder] - shard.size))
            parts.append((inputs, checked(shard, labels, self.num_classes)))
        inputs, labels = (torch.cat(part)[torch.from_numpy(back)] for part in zip(*parts))
        return (inputs.pin_memory() if self.device.type == "cuda" else inputs), labels

    def _finish(self, batch: Batch) -> Batch:
        inputs, labels = batch
        inputs = inputs.to(self.device, non_blocking=True)
        return self.preprocess(inputs) if self._is_image else inputs, labels.to(self.device)


def checked(shard: Shard, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels of a shard, if all are classes. Raises DataError."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{shard.path} has the label {low if low < 0 else high}, but there are {num_classes} classes, "
            "counted from 0; correct the labels, or the number of classes that the files state."
        )
    return labels


def _dtype(shard: Shard) -> torch.dtype:
    return torch.uint8 if shard.is_image else torch.float32
