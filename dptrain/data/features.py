"""Features of a frozen backbone, computed once: head-only training is then one gather."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from dptrain.data.protocol import Batch, Dataset, Inputs, blank


class Features:
    """Inputs [N, *F] float32 and labels [N] int64 kept on the compute device.

    Each row depends on its own example only, so training on features is as private as training
    on the images.
    """

    def __init__(self, name: str, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        self.name = name
        self.num_classes = num_classes
        self.input_shape: tuple[int, ...] = tuple(features.shape[1:])
        self._features = features
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> torch.Tensor:
        """All labels [N] int64."""
        return self._labels

    @property
    def rows(self) -> torch.Tensor:
        """All features [N, *F]."""
        return self._features

    def gather(self, indices: torch.Tensor) -> Batch:
        at = indices.to(self._labels.device)
        return self._features.index_select(0, at), self._labels.index_select(0, at)

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        return map(self.gather, indices)

    def subset(self, indices: torch.Tensor) -> Features:
        at = indices.to(self._labels.device)
        return Features(
            self.name,
            self._features.index_select(0, at),
            self._labels.index_select(0, at),
            self.num_classes,
        )

    def stand_in(self, size: int) -> Batch:
        return blank(size, self.input_shape, self._labels.device)


@torch.no_grad()
def cache_features(
    dataset: Dataset,
    backbone: Callable[[Inputs], torch.Tensor],
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> Features:
    """Run the frozen `backbone` over every example of `dataset` once.

    backbone: inputs [B, *input_shape] -> features [B, *F], in evaluation mode.
    on_progress: called with the number of examples done since the last call.
    """
    rows, labels = [], []
    for inputs, batch_labels in dataset.stream(in_order(len(dataset), batch_size)):
        rows.append(backbone(inputs).float())
        labels.append(batch_labels)
        if on_progress is not None:
            on_progress(len(batch_labels))
    return named_features(dataset, torch.cat(rows), torch.cat(labels))


def named_features(dataset: Dataset, rows: torch.Tensor, labels: torch.Tensor) -> Features:
    """Features [N, *F] of the examples of `dataset`, in its order, under its name."""
    return Features(f"{dataset.name} (features)", rows, labels, dataset.num_classes)


def in_order(length: int, batch_size: int) -> Iterator[torch.Tensor]:
    """All indices from 0 to length - 1 in consecutive tensors of at most `batch_size`."""
    return iter(torch.arange(length).split(batch_size))
