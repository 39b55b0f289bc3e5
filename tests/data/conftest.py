"""Small files in the published formats."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def mnist_dir(tmp_path: Path) -> Path:
    """A data directory with 20 training and 10 test images in MNIST's layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


@pytest.fixture
def cifar100_dir(tmp_path: Path) -> Path:
    """A data directory with 6 training and 4 test records in CIFAR-100's binary layout."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, count in (("train.bin", 6), ("test.bin", 4)):
        records = np.zeros((count, 3074), dtype=np.uint8)
        records[:, 0] = 19  # coarse label, not used
        records[:, 1] = np.arange(count) + 90
        records[:, 2:1026] = 255  # the red plane
        records.tofile(folder / name)
    return tmp_path
