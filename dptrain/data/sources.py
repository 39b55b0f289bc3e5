"""Data sets by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from dptrain.data import cifar, digits, folder, idx, shards
from dptrain.data.decode import DEFAULT_IMAGE_SIZE
from dptrain.data.huggingface import PREFIX, Columns, Tokenization, load_huggingface
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import DataError, Splits
from dptrain.data.resident import ResidentImages

DATA_DIR_VARIABLE = "DPTRAIN_DATA"
ARCHIVED = {source.name: source for source in (idx.MNIST, idx.FASHION_MNIST, cifar.CIFAR10, cifar.CIFAR100)}
NAMES = ("digits", *ARCHIVED)


def default_data_dir() -> Path:
    """The folder named by the environment variable DPTRAIN_DATA, else `data` where you are."""
    return Path(os.environ.get(DATA_DIR_VARIABLE) or "data")


def load(
    name: str,
    data_dir: Path | str | None = None,
    preprocess: Preprocess | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    workers: int | None = None,
    columns: Columns | None = None,
    tokenization: Tokenization | None = None,
) -> Splits:
    """Train and test splits of a data set.

    name: one of `NAMES`; the path of an image folder with train/ and test/ (or val/); `shards:...`, a folder
    of files that are read by index; or `hf:...`, for which `columns` and `tokenization` are.
    data_dir: where archives lie (default: `default_data_dir()`); download: fetch what is missing.
    Raises DataError, with one sentence, for what is missing, truncated or wrong.
    """
    preprocess = preprocess or Preprocess()
    root = Path(data_dir) if data_dir is not None else default_data_dir()
    if name.startswith(PREFIX):
        return load_huggingface(
            name, root, columns or Columns(), tokenization or Tokenization(), preprocess, device
        )
    if name.startswith(shards.PREFIX):
        label = columns.label if columns else None
        return shards.load_shards(name, root, label, preprocess, device, workers)
    if name == "digits":
        return _resident(
            name,
            digits.read(),
            digits.NUM_CLASSES,
            replace(preprocess, full_scale=digits.FULL_SCALE),
            device,
        )
    if name in ARCHIVED:
        source = ARCHIVED[name]
        return _resident(name, source.read(root, download), source.num_classes, preprocess, device)
    path = next((candidate for candidate in (Path(name), root / name) if os.path.isdir(candidate)), None)
    if path is None:
        raise DataError(
            f"There is no data set or image folder {name!r}; use one of {', '.join(NAMES)}, a "
            "folder's path, hf: and a name on the Hugging Face hub or a path, or shards: and a path."
        )
    classes, train, test = folder.scan(path)
    preprocess = replace(preprocess, image_size=preprocess.image_size or DEFAULT_IMAGE_SIZE)
    return Splits(
        folder.FolderImages(path.name, train, len(classes), preprocess, device, workers),
        folder.FolderImages(path.name, test, len(classes), preprocess, device, workers),
    )


def _resident(name, arrays, num_classes: int, preprocess: Preprocess, device: torch.device | str) -> Splits:
    (train_images, train_labels), (test_images, test_labels) = arrays
    return Splits(
        ResidentImages(f"{name} train", train_images, train_labels, num_classes, preprocess, device),
        ResidentImages(f"{name} test", test_images, test_labels, num_classes, preprocess, device),
    )
