"""MNIST and Fashion-MNIST: IDX files, gzipped or not, in torchvision's folders."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from dptrain.data.download import fetch_file
from dptrain.data.protocol import DataError

UNSIGNED_BYTE = 0x08
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
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); fetch it again.") from error
    header = 4 * (1 + dimensions)
    if len(content) < header or content[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]):
        raise DataError(f"{path} is not an IDX file of bytes with {dimensions} dimensions; fetch it again.")
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4).tolist()
    if any(size < 0 for size in shape) or len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} announces {'x'.join(map(str, shape))} bytes but holds "
            f"{len(content) - header}; fetch it again."
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy())


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
