"""A folder of images, one subfolder per class, decoded by workers ahead of use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from dptrain.data.decode import DEFAULT_IMAGE_SIZE, check_header, decode
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import Batch, DataError, blank

PREFETCH_BATCHES = 4
TEST_FOLDERS = ("test", "val")


class _Decoder(torch.utils.data.Dataset):
    """Item i: (image [3, S, S] uint8, label), decoded from its file."""

    def __init__(self, samples: list[tuple[str, int]], image_size: int) -> None:
        self.samples = samples
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return decode(path, self.image_size), label

    def __getitems__(self, indices: list[int]) -> Batch | DataError:
        """A batch, or why there is none: an error raised in a worker would come with its traceback."""
        try:
            return default_collate([self[index] for index in indices])
        except DataError as error:
            return error


class FolderImages:
    """A data set that stays on disk; batches are decoded when needed, or ahead by workers."""

    def __init__(
        self,
        name: str,
        samples: list[tuple[str, int]],
        num_classes: int,
        preprocess: Preprocess,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.device = torch.device(device)
        self.preprocess = preprocess
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        size = preprocess.image_size or DEFAULT_IMAGE_SIZE
        self.input_shape: tuple[int, ...] = preprocess.output_shape((3, size, size))
        self._decoder = _Decoder(samples, size)

    def __len__(self) -> int:
        return len(self._decoder)

    @property
    def labels(self) -> torch.Tensor:
        """All labels [N] int64."""
        return torch.tensor([label for _, label in self._decoder.samples])

    def gather(self, indices: torch.Tensor) -> Batch:
        return self._finish(self._decoder.__getitems__(indices.tolist()))

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Batches in order; workers decode up to `PREFETCH_BATCHES` each ahead."""
        loader = DataLoader(
            self._decoder,
            batch_sampler=_Lists(indices),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            prefetch_factor=PREFETCH_BATCHES if self.workers else None,
            multiprocessing_context=_start_method() if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        return map(self._finish, loader)

    def subset(self, indices: torch.Tensor) -> FolderImages:
        samples = [self._decoder.samples[index] for index in indices.tolist()]
        return FolderImages(self.name, samples, self.num_classes, self.preprocess, self.device, self.workers)

    def stand_in(self, size: int) -> Batch:
        return blank(size, self.input_shape, self.device)

    def _finish(self, batch: Batch | DataError) -> Batch:
        if isinstance(batch, DataError):
            raise batch
        images, labels = batch
        return self.preprocess(images.to(self.device, non_blocking=True)), labels.to(self.device)


def _start_method() -> str | None:
    """How workers come to be: not by a fork beside JAX, some thread of which may hold a lock just then."""
    return "spawn" if "jax" in sys.modules else None


def _as_it_is(batch: Batch | DataError) -> Batch | DataError:
    return batch


class _Lists:
    """Index tensors as the lists of integers that DataLoader wants, made one at a time."""

    def __init__(self, indices: Iterable[torch.Tensor]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._indices)


def scan(root: Path) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """Class names, and the (file, label) samples of train/ and of test/ or val/ under `root`."""
    if not (root / "train").is_dir():
        raise DataError(
            f"{root} has no folder train/; lay the images out as train/CLASS/*.jpg and test/CLASS/*.jpg."
        )
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test_folder is None:
        raise DataError(f"{root} has neither test/ nor val/; a run needs images that it is not trained on.")
    try:
        train, test = ImageFolder(str(root / "train")), ImageFolder(str(test_folder))
    except OSError as error:
        raise DataError(
            f"{root}: {str(error).splitlines()[0].rstrip('.')}; give every class at least one image."
        ) from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{root}: the classes of train/ and {test_folder.name}/ differ "
            f"({', '.join(map(repr, odd[:5]))}); make them equal."
        )
    for path, _ in (*train.samples, *test.samples):  # before the first step, not in the middle of a run
        check_header(path)
    return train.classes, train.samples, test.samples
