"""A shard of arrays in the safetensors format: `images` or `inputs`, and `labels`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dptrain.core.files import Unreadable, size_of
from dptrain.core.printable import reason
from dptrain.data.decode import MOST_PIXELS
from dptrain.data.protocol import DataError
from dptrain.data.sharded import Rows

SUFFIX = ".safetensors"
NUMBER_OF_CLASSES = "num_classes"
"""The key of the metadata under which a file may state it."""
LARGEST_FILE = 2**50
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "I64")


@dataclass(frozen=True)
class SafetensorsShard:
    """Tensors `images` [n, C, H, W] uint8 or `inputs` [n, ...] of floating point, and `labels` [n] integers.

    The file is mapped for as long as a read takes, and of its pages only those of the rows are touched.
    """

    path: str
    size: int
    stored_shape: tuple[int, ...]
    is_image: bool
    num_classes: int | None

    @classmethod
    def open(cls, path: str) -> SafetensorsShard:
        """The shard in a file, of which only the header is read. Raises DataError."""
        with _opened(path) as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
            facts = {
                name: (tuple(tensor.get_shape()), str(tensor.get_dtype())) for name, tensor in tensors.items()
            }
            classes = (file.metadata() or {}).get(NUMBER_OF_CLASSES)
        kinds = [name for name in ("images", "inputs") if name in facts]
        if len(kinds) != 1 or "labels" not in facts:
            raise DataError(
                f"{path} holds {', '.join(sorted(facts)[:5]) or 'nothing'}; a shard holds labels, and either "
                "images or inputs."
            )
        (shape, dtype), is_image = facts[kinds[0]], kinds == ["images"]
        if is_image and (len(shape) != 4 or dtype != "U8"):
            raise DataError(f"{path}: images must be uint8 of shape [n, C, H, W], not {dtype} {list(shape)}.")
        if not is_image and (len(shape) < 2 or dtype not in FLOATS):
            raise DataError(
                f"{path}: inputs must be of floating point and of shape [n, ...], not {dtype} {list(shape)}."
            )
        labels_shape, labels_dtype = facts["labels"]
        if labels_shape != shape[:1] or labels_dtype not in INTEGERS:
            raise DataError(
                f"{path}: there must be one label, an integer, for each of {shape[0]} examples, but labels "
                f"are {labels_dtype} {list(labels_shape)}."
            )
        if not 0 < math.prod(shape[1:]) <= 4 * MOST_PIXELS or shape[0] == 0:
            raise DataError(f"{path}: {kinds[0]} of shape {list(shape)} hold nothing, or too much at once.")
        if classes is not None and not (classes.isascii() and classes.isdigit() and len(classes) < 10):
            raise DataError(f"{path}: its {NUMBER_OF_CLASSES} is no number; write a text such as '10'.")
        return cls(path, shape[0], shape[1:], is_image, int(classes) if classes is not None else None)

    def read(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = np.empty((len(rows), *self.stored_shape), dtype=np.uint8 if self.is_image else np.float32)
        labels = np.empty(len(rows), dtype=np.int64)
        with _opened(self.path) as file:
            stored, stored_labels = (
                file.get_slice("images" if self.is_image else "inputs"),
                file.get_slice("labels"),
            )
            for start, end in _runs(rows):
                span = slice(int(rows[start]), int(rows[end - 1]) + 1)
                inputs[start:end], labels[start:end] = stored[span], stored_labels[span]
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    def labels(self) -> torch.Tensor:
        with _opened(self.path) as file:
            return torch.from_numpy(file.get_slice("labels")[:].astype(np.int64))


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of ascending `rows` that has no gap."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    yield from zip((0, *breaks), (*breaks, len(rows)))


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Whatever the reader of damaged files raises is one sentence."""
    try:
        size_of(path, LARGEST_FILE)
        with safe_open(path, framework="numpy") as file:
            yield file
    except Unreadable as error:
        raise DataError(f"{path} {error}; repair or remove it.") from error
    except Exception as error:  # of safetensors, and of NumPy for types that it does not know
        raise DataError(
            f"{path} is not a readable safetensors file ({reason(error)}); write it again."
        ) from error
