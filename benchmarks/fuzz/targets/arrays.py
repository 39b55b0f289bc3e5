"""IDX and CIFAR files."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch

from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.files import of_bytes
from dptrain.data import DataError, ResidentImages
from dptrain.data.cifar import CIFAR10, CIFAR100, read_binary
from dptrain.data.idx import read_idx
from dptrain.data.preprocess import Preprocess


def idx(*shape: int, content: bytes | None = None) -> bytes:
    """An IDX file of bytes that announces a shape."""
    size = 1
    for axis in shape:
        size *= axis
    header = bytes([0, 0, 8, len(shape)]) + b"".join(axis.to_bytes(4, "big") for axis in shape)
    return header + (bytes(i % 10 for i in range(size)) if content is None else content)


IMAGES = (
    idx(3, 28, 28),
    idx(1, 2, 2),
    idx(0, 28, 28),
    idx(3, 0, 28),
    idx(2**31 - 1, 2**31 - 1, 2**31 - 1, content=b""),
    idx(65_536, 65_536, 1, content=bytes(100)),
)
LABELS = (idx(3), idx(1), idx(0), idx(2**31 - 1, content=b"\1\2"), idx(3, content=b"\1\2\xff"))


def _gzipped(plain: tuple[bytes, ...]) -> tuple[bytes, ...]:
    packed = tuple(gzip.compress(content, mtime=0) for content in plain)
    bomb = gzip.compress(idx(2**20, 28, 28, content=bytes(1 << 26)), mtime=0)  # 64 MiB in 64 kB
    broken = packed[0][:-8] + bytes(8)
    return (*packed * 4, bomb, broken, packed[0] + packed[0], packed[0] + b"trailing")


def _read_images(path: Path) -> None:
    images = read_idx(path, 3)
    if images.dim() != 3 or images.dtype != torch.uint8:
        raise Wrong(f"{images.dtype} {tuple(images.shape)}.")
    if images.numel() < 1 << 24:
        labels = torch.zeros(len(images), dtype=torch.int64)
        ResidentImages(f"{path}", images.unsqueeze(1), labels, 10, Preprocess()).gather(torch.arange(1))


def _read_labels(path: Path) -> None:
    labels = read_idx(path, 1)
    if labels.dim() != 1 or labels.dtype != torch.uint8:
        raise Wrong(f"{labels.dtype} {tuple(labels.shape)}.")


def _cifar(label_bytes: int) -> tuple[bytes, ...]:
    record = bytes(label_bytes) + bytes(range(256)) * 12
    return (
        record * 3,
        record,
        record[:-1],
        record + b"\0",
        b"",
        bytes([255]) * len(record),
        bytes(len(record) * 9),
    )


def _read_cifar(source, path: Path) -> None:
    images, labels = read_binary(path, source.label_bytes)
    if images.shape != (len(labels), 3, 32, 32) or len(labels) == 0:
        raise Wrong(f"{tuple(images.shape)} and {tuple(labels.shape)}.")
    ResidentImages(f"{path}", images, labels, source.num_classes, Preprocess()).gather(torch.arange(1))


_ERRORS = (DataError,)
TARGETS: tuple[Target, ...] = (
    of_bytes("idx-images", "images-idx3-ubyte", IMAGES, _read_images, _ERRORS, 6000),
    of_bytes("idx-labels", "labels-idx1-ubyte", LABELS, _read_labels, _ERRORS, 8000),
    of_bytes("idx-images-gzip", "images-idx3-ubyte.gz", _gzipped(IMAGES), _read_images, _ERRORS, 3000),
    of_bytes("idx-labels-gzip", "labels-idx1-ubyte.gz", _gzipped(LABELS), _read_labels, _ERRORS, 4000),
    of_bytes("cifar10", "data_batch_1.bin", _cifar(1), lambda p: _read_cifar(CIFAR10, p), _ERRORS, 5000),
    of_bytes("cifar100", "train.bin", _cifar(2), lambda p: _read_cifar(CIFAR100, p), _ERRORS, 5000),
)
