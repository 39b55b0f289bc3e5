"""MNIST and Fashion-MNIST: IDX files, gzipped or not, in torchvision's folders."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from dptrain.core.files import MIB, Unreadable, size_of
from dptrain.data.download import fetch_file
from dptrain.data.protocol import DataError

UNSIGNED_BYTE = 0x08
LARGEST = 256 * MIB
"""Bytes of one array, unpacked: five times the largest of these data sets."""
Arrays = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class IdxSource:
    """One data set in IDX format."""

    name: str
    folder: str
    resources: tuple[tuple[str, str], ...]
    """(file name, published MD5) for the four gzipped files."""
    mirrors: tuple[str, ...]
    num_classes: int = 10

    def read(self, data_dir: Path, download: bool) -> tuple[Arrays, Arrays]:
        """(images [N, 1, 28, 28] uint8, labels [N] int64) of train and of test."""
        folder = self._locate(data_dir, download)
        return self._part(folder, "train"), self._part(folder, "t10k")

    def _locate(self, data_dir: Path, download: bool) -> Path:
        raw = data_dir / self.folder / "raw"
        for folder in (raw, data_dir / self.folder, data_dir):
            if _find(folder, "train-images-idx3-ubyte"):
                return folder
        if not download:
            raise DataError(
                f"{self.name} was not found under {data_dir} (looked for "
                f"{self.folder}/raw/train-images-idx3-ubyte.gz); "
                "set --data-dir to where it lies, or add --download."
            )
        for file, md5 in self.resources:
            fetch_file(self.mirrors[0] + file, raw, md5)
        return raw

    def _part(self, folder: Path, prefix: str) -> Arrays:
        images = read_idx(_require(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_require(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
        return images.unsqueeze(1), labels.to(torch.int64)


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """The uint8 tensor in an IDX file, which must have `dimensions` axes and its full length."""
    try:
        size_of(path, LARGEST)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return _read(path, file.read, dimensions)
    except Unreadable as error:
        raise DataError(f"{path} {error}; fetch it again.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); fetch it again.") from error


def _read(path: Path, take: Callable[[int], bytes], dimensions: int) -> torch.Tensor:
    """No more is unpacked than the header announces: a small file may unpack to any size."""
    header = take(4 * (1 + dimensions))
    if len(header) < 4 * (1 + dimensions) or header[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]):
        raise Unreadable(f"is not an IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(header, dtype=">u4", offset=4).tolist()
    announced = math.prod(shape)
    said = f"announces {'x'.join(map(str, shape))} bytes"
    if announced > LARGEST:
        raise Unreadable(f"{said}, more than the {LARGEST:,} that are ever read")
    if announced == 0:
        raise Unreadable(f"{said}, which is nothing")
    content = take(announced)
    if len(content) < announced:
        raise Unreadable(f"{said} but holds {len(content)}")
    if take(1):
        raise Unreadable(f"{said} but holds more")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _require(folder: Path, stem: str) -> Path:
    path = _find(folder, stem)
    if path is None:
        raise DataError(
            f"{folder} lacks {stem}(.gz); put the missing file there or add --download in an empty folder."
        )
    return path


def _source(name: str, torchvision_class: type[datasets.MNIST]) -> IdxSource:
    resources = tuple((file, md5) for file, md5 in torchvision_class.resources)
    return IdxSource(name, torchvision_class.__name__, resources, tuple(torchvision_class.mirrors))


MNIST = _source("mnist", datasets.MNIST)
FASHION_MNIST = _source("fashion-mnist", datasets.FashionMNIST)
