"""CIFAR-10 and CIFAR-100: the binary format, or torchvision's verified pickles."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from dptrain.data.download import fetch_archive, md5_of
from dptrain.data.protocol import DataError

CHANNELS, SIZE = 3, 32
PIXEL_BYTES = CHANNELS * SIZE * SIZE
Arrays = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CifarSource:
    """One of the two CIFAR data sets, in either published format."""

    name: str
    num_classes: int
    label_bytes: int
    """Label bytes before each image in the binary format; the last one is the label we use."""
    binary_folder: str
    binary_train: tuple[str, ...]
    binary_test: tuple[str, ...]
    binary_url: str
    binary_md5: str
    torchvision_class: Any
    label_key: str

    def read(self, data_dir: Path, download: bool) -> tuple[Arrays, Arrays]:
        """(images [N, 3, 32, 32] uint8, labels [N] int64) of train and of test."""
        for folder in (data_dir / self.binary_folder, data_dir):
            if (folder / self.binary_train[0]).is_file():
                return self._binary(folder, self.binary_train), self._binary(folder, self.binary_test)
        pickles = data_dir / self.torchvision_class.base_folder
        if pickles.is_dir():
            cls = self.torchvision_class
            return self._pickled(pickles, cls.train_list), self._pickled(pickles, cls.test_list)
        if not download:
            raise DataError(
                f"{self.name} was not found under {data_dir} (looked for "
                f"{self.binary_folder}/{self.binary_train[0]} "
                f"and {self.torchvision_class.base_folder}/); set --data-dir to where it lies, or "
                "add --download."
            )
        # The binary archive is preferred: reading it can execute nothing.
        fetch_archive(self.binary_url, data_dir, self.binary_md5)
        return self.read(data_dir, download=False)

    def _binary(self, folder: Path, files: tuple[str, ...]) -> Arrays:
        parts = [read_binary(folder / file, self.label_bytes) for file in files]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    def _pickled(self, folder: Path, files: list[list[str]]) -> Arrays:
        parts = [read_verified_pickle(folder / file, md5) for file, md5 in files]
        images = np.concatenate([np.asarray(part["data"], dtype=np.uint8) for part in parts])
        labels = np.concatenate([np.asarray(part[self.label_key], dtype=np.int64) for part in parts])
        return torch.from_numpy(images.reshape(-1, CHANNELS, SIZE, SIZE)), torch.from_numpy(labels)


def read_binary(path: Path, label_bytes: int) -> Arrays:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of one file of fixed-length records."""
    if not path.is_file():
        raise DataError(f"{path} is missing; the data set is incomplete, fetch it again.")
    content = np.fromfile(path, dtype=np.uint8)
    record = label_bytes + PIXEL_BYTES
    if content.size == 0 or content.size % record:
        raise DataError(
            f"{path} has {content.size} bytes, which is not a whole number of {record}-byte "
            "records; "
            "it is truncated or of another data set."
        )
    records = torch.from_numpy(content.reshape(-1, record))
    images = records[:, label_bytes:].reshape(-1, CHANNELS, SIZE, SIZE).contiguous()
    return images, records[:, label_bytes - 1].to(torch.int64)


def read_verified_pickle(path: Path, md5: str) -> dict[str, Any]:
    """Unpickle `path` if and only if its bytes have the published checksum.

    Unpickling runs code, so the checked bytes themselves are loaded: the file is not read twice.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; the data set is incomplete, fetch it again.")
    content = path.read_bytes()
    found = md5_of(content)
    if found != md5:
        raise DataError(
            f"{path} has checksum {found}, not the published {md5}; it is not unpickled, because "
            "that could run "
            "foreign code. Fetch it again, or use the binary format."
        )
    return pickle.loads(content, encoding="latin1")


CIFAR10 = CifarSource(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    binary_folder="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    binary_test=("test_batch.bin",),
    binary_url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
    torchvision_class=datasets.CIFAR10,
    label_key="labels",
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
    torchvision_class=datasets.CIFAR100,
    label_key="fine_labels",
)
