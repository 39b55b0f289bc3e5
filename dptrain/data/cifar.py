"""CIFAR-10 and CIFAR-100 in their binary format.

The pickled one is not read, whatever its checksum: to unpickle is to run code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dptrain.core.files import MIB, Unreadable, size_of
from dptrain.data.download import fetch_archive
from dptrain.data.protocol import DataError

CHANNELS, SIZE = 3, 32
PIXEL_BYTES = CHANNELS * SIZE * SIZE
LARGEST = 256 * MIB
"""Bytes of one file; the largest of these data sets has 154 million."""
Arrays = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CifarSource:
    """One of the two CIFAR data sets."""

    name: str
    num_classes: int
    label_bytes: int
    """Label bytes before each image in the binary format; the last one is the label we use."""
    binary_folder: str
    binary_train: tuple[str, ...]
    binary_test: tuple[str, ...]
    binary_url: str
    binary_md5: str
    pickled_folder: str
    """Where the other published format lies, as torchvision has it."""

    def read(self, data_dir: Path, download: bool) -> tuple[Arrays, Arrays]:
        """(images [N, 3, 32, 32] uint8, labels [N] int64) of train and of test."""
        for folder in (data_dir / self.binary_folder, data_dir):
            if (folder / self.binary_train[0]).is_file():
                return self._binary(folder, self.binary_train), self._binary(folder, self.binary_test)
        if not download:
            pickled = (data_dir / self.pickled_folder).is_dir()
            hint = f"; {self.pickled_folder} holds pickles, which can run code and are not read" * pickled
            raise DataError(
                f"{self.name} was not found under {data_dir} (looked for "
                f"{self.binary_folder}/{self.binary_train[0]}{hint}); set --data-dir to where its binary "
                "version lies, or add --download."
            )
        fetch_archive(self.binary_url, data_dir, self.binary_md5)
        return self.read(data_dir, download=False)

    def _binary(self, folder: Path, files: tuple[str, ...]) -> Arrays:
        parts = [read_binary(folder / file, self.label_bytes) for file in files]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def read_binary(path: Path, label_bytes: int) -> Arrays:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of one file of fixed-length records."""
    if not path.exists():
        raise DataError(f"{path} is missing; the data set is incomplete, fetch it again.")
    record = label_bytes + PIXEL_BYTES
    try:
        size = size_of(path, LARGEST)
        if size == 0 or size % record:
            raise Unreadable(f"has {size} bytes, which is not a whole number of {record}-byte records")
        content = np.fromfile(path, dtype=np.uint8, count=size)
    except (Unreadable, OSError) as error:
        raise DataError(f"{path} {error}; it is truncated or of another data set.") from error
    records = torch.from_numpy(content.reshape(-1, record))
    images = records[:, label_bytes:].reshape(-1, CHANNELS, SIZE, SIZE).contiguous()
    return images, records[:, label_bytes - 1].to(torch.int64)


CIFAR10 = CifarSource(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    binary_folder="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    binary_test=("test_batch.bin",),
    binary_url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
    pickled_folder="cifar-10-batches-py",
)
CIFAR100 = CifarSource(
    name="cifar100",
    num_classes=100,
    label_bytes=2,
    binary_folder="cifar-100-binary",
    binary_train=("train.bin",),
    binary_test=("test.bin",),
    binary_url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    binary_md5="03b5dce01913d631647c71ecec9e9cb8",
    pickled_folder="cifar-100-python",
)
