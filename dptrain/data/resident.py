"""Images kept as uint8 where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import Batch, DataError, blank

RESIDENT_SHARE = 0.25
"""The part of the free device memory that images may take; the rest belongs to training."""


class ResidentImages:
    """A data set whose images [N, C, H, W] and labels [N] stay in memory as uint8 and int64.

    They lie on `device` when they fit into a quarter of its free memory, otherwise in host
    memory, from where each batch is copied.
    """

    def __init__(
        self,
        name: str,
        images: torch.Tensor,
        labels: torch.Tensor,
        num_classes: int,
        preprocess: Preprocess,
        device: torch.device | str = "cpu",
    ) -> None:
        check_labelled(name, images, labels, num_classes)
        self.name = name
        self.num_classes = num_classes
        self.preprocess = preprocess
        self.device = torch.device(device)
        channels, height, width = images.shape[1:]
        self.input_shape: tuple[int, ...] = preprocess.output_shape((channels, height, width))
        home = self.device if fits(images.numel(), self.device) else torch.device("cpu")
        self._images = images.to(home)
        self._labels = labels.to(home, torch.int64)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> torch.Tensor:
        """All labels [N] int64."""
        return self._labels

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """All that it holds: images [N, C, H, W] uint8 and labels [N]."""
        return {"images": self._images, "labels": self._labels}

    def gather(self, indices: torch.Tensor) -> Batch:
        """One gather, then resize and normalise on the compute device."""
        at = indices.to(self._labels.device)
        images = self._images.index_select(0, at).to(self.device, non_blocking=True)
        return self.preprocess(images), self._labels.index_select(0, at).to(self.device)

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        return map(self.gather, indices)

    def subset(self, indices: torch.Tensor) -> ResidentImages:
        at = indices.to(self._labels.device)
        return ResidentImages(
            self.name,
            self._images.index_select(0, at),
            self._labels.index_select(0, at),
            self.num_classes,
            self.preprocess,
            self.device,
        )

    def stand_in(self, size: int) -> Batch:
        return blank(size, self.input_shape, self.device)


def check_labelled(name: str, images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    """Refuse images and labels that do not belong together."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise DataError(
            f"{name}: images must be uint8 of shape [N, C, H, W], not {images.dtype} {list(images.shape)}."
        )
    if len(images) != len(labels):
        raise DataError(
            f"{name}: {len(images)} images but {len(labels)} labels; the files do not belong together."
        )
    if len(images) == 0:
        raise DataError(f"{name} holds no examples; check the data directory.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"{name}: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but there are {num_classes} classes; the label file is damaged or of another data "
            "set."
        )


def fits(size_bytes: int, device: torch.device) -> bool:
    """Whether `size_bytes` of images may stay on `device`."""
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return size_bytes <= RESIDENT_SHARE * free_bytes
