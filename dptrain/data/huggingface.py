"""Texts or images by the library datasets: `hf:NAME[:CONFIGURATION]`, or `hf:PATH`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import functional

from dptrain.core.printable import reason
from dptrain.data.decode import DEFAULT_IMAGE_SIZE, square
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import DataError, Dataset, Splits
from dptrain.data.resident import ResidentImages
from dptrain.data.text import Encoder, ResidentTexts

PREFIX = "hf:"
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "validation_matched")
USUAL_TEXT, USUAL_LABEL = ("text", "sentence"), ("label", "labels")
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
UNLABELLED = -1
"""What data sets put where a label is withheld, in test splits of competitions for example."""


@dataclass(frozen=True)
class Columns:
    """What to read. None: to be guessed, if there is one choice only."""

    text: str | None = None
    """A column of texts, or two with a comma between them for pairs."""
    label: str | None = None


@dataclass(frozen=True)
class Tokenization:
    """How texts become tokens."""

    tokenizer: str | None = None
    """Name on the hub or folder."""
    length: int | None = None
    """Tokens per text; None: see `Encoder`."""
    longest: int | None = None
    """What the model can read."""


def load_huggingface(
    name: str,
    root: Path,
    columns: Columns,
    tokenization: Tokenization,
    preprocess: Preprocess,
    device: torch.device | str,
) -> Splits:
    """The split `train` and the first labelled one of `TEST_SPLITS`. Raises DataError.

    Images if there is a column of images and no text column was asked for, else texts.
    """
    splits = _read(name, root)
    train = splits.get("train")
    if train is None:
        raise DataError(f"{name} has no split train, only {', '.join(splits)}; name one so.")
    label = _label_column(name, train, columns.label)
    test_name = next((split for split in TEST_SPLITS if _is_labelled(splits.get(split), label)), None)
    parts = {"train": train} | ({test_name: splits[test_name]} if test_name else {})
    labels, num_classes = _labels(name, parts, label)
    images = [key for key, feature in train.features.items() if type(feature).__name__ == "Image"]
    made: dict[str, Dataset] = {}
    if images and columns.text is None:
        if len(images) > 1:
            raise DataError(f"{name} has several columns of images ({', '.join(images)}); keep one.")
        for split, part in parts.items():
            facts = f"{name} {split}", labels[split], num_classes, preprocess, device
            made[split] = _images(part[images[0]], *facts)
    else:
        wanted = _text_columns(name, train, columns.text, label)
        if tokenization.tokenizer is None:
            raise DataError(f"{name} holds texts: choose a --model hf:NAME, or give a --tokenizer.")
        encoder = Encoder(tokenization.tokenizer, tokenization.length, tokenization.longest)
        stand_ins = encoder.stand_ins(len(wanted))
        for split, part in parts.items():
            tokens = encoder(*(_texts(name, part, column) for column in wanted))
            made[split] = ResidentTexts(
                f"{name} {split}", tokens, labels[split], num_classes, encoder, stand_ins, device
            )
    if len({part.input_shape for part in made.values()}) > 1:
        raise DataError(f"{name}: the images of {' and '.join(made)} differ in their channels or size.")
    return Splits(made["train"], made.get(test_name or ""), test_name or "test")


def _read(name: str, root: Path) -> dict[str, Any]:
    """All splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Data named hf:... need the package datasets; install it with "
            "`pip install 'dptrain[transformers]'`."
        ) from error
    source = name.removeprefix(PREFIX)
    path = next((candidate for candidate in (Path(source), root / source) if os.path.exists(candidate)), None)
    try:
        if path is None:
            hub_name, _, configuration = source.partition(":")
            found = datasets.load_dataset(hub_name, configuration or None)
        elif path.is_file():
            if path.suffix not in READERS:
                raise DataError(f"{path} is none of {', '.join(READERS)}; convert it to one of them.")
            found = datasets.load_dataset(READERS[path.suffix], data_files=str(path))
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except DataError:
        raise
    except Exception as error:  # its readers of damaged files raise what they like
        raise DataError(
            f"{name} cannot be read ({reason(error)}); give a name on the Hugging Face hub (hf:NAME or "
            "hf:NAME:CONFIGURATION), a folder of .csv, .json or .parquet files or of save_to_disk, or a file."
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _label_column(name: str, train: Any, wanted: str | None) -> str:
    if wanted is not None:
        return _existing(name, train, wanted, "--label-column")
    classes = [key for key, feature in train.features.items() if type(feature).__name__ == "ClassLabel"]
    usual = [key for key in USUAL_LABEL if key in train.features]
    if len(classes) == 1 or usual:
        return classes[0] if len(classes) == 1 else usual[0]
    raise DataError(
        f"Which column of {name} is the label is not clear; give --label-column, one of "
        f"{', '.join(train.features)}."
    )


def _text_columns(name: str, train: Any, wanted: str | None, label: str) -> list[str]:
    if wanted is not None:
        chosen = [part.strip() for part in wanted.split(",")]
        if len(chosen) > 2:
            raise DataError(f"--text-column names {len(chosen)} columns; give one, or two for pairs.")
        return [_existing(name, train, column, "--text-column") for column in chosen]
    texts = [key for key, feature in train.features.items() if _is_text(feature) and key != label]
    usual = [key for key in USUAL_TEXT if key in texts]
    if len(texts) == 1 or usual:
        return texts[:1] if len(texts) == 1 else usual[:1]
    raise DataError(
        f"Which column of {name} is the text is not clear; give --text-column, one of "
        f"{', '.join(train.features)}, or two with a comma between them."
    )


def _existing(name: str, train: Any, column: str, flag: str) -> str:
    if column not in train.features:
        raise DataError(f"{name} has no column {column!r}; give {flag} one of {', '.join(train.features)}.")
    return column


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string") and hasattr(feature, "pa_type")


def _texts(name: str, part: Any, column: str) -> list[str]:
    texts = list(part[column])
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{name}: the column {column} does not hold a text in every row; mend or choose another."
        )
    return texts


def _is_labelled(part: Any, label: str) -> bool:
    """Whether a split is there and has labels."""
    if part is None or label not in part.features or len(part) == 0:
        return False
    return part[0][label] not in (None, UNLABELLED)


def _labels(name: str, parts: dict[str, Any], column: str) -> tuple[dict[str, torch.Tensor], int]:
    """Class numbers [N] int64 of each split, and how many classes there are.

    Which classes there are counts as public. Where the data set does not list them, they are the
    values that occur, in their order.
    """
    values = {split: list(part[column]) for split, part in parts.items()}
    feature = parts["train"].features[column]
    if type(feature).__name__ == "ClassLabel":
        classes: list[Any] = list(range(feature.num_classes))
    else:
        everything = [value for each in values.values() for value in each]
        if not all(isinstance(value, str | int) for value in everything):
            raise DataError(
                f"{name}: the labels in {column} are not classes in every row; choose another column."
            )
        classes = sorted(set(everything))
    if len(classes) < 2:
        raise DataError(f"{name}: all labels in {column} are the same; there is nothing to learn.")
    number = {value: index for index, value in enumerate(classes)}
    for split, each in values.items():
        for row, value in enumerate(each):
            if value not in number:
                raise DataError(f"{name}: row {row} of {split} has the label {value}, which is no class.")
    return {split: torch.tensor([number[v] for v in each]) for split, each in values.items()}, len(classes)


def _images(
    images: Iterable[Any],
    name: str,
    labels: torch.Tensor,
    num_classes: int,
    preprocess: Preprocess,
    device: torch.device | str,
) -> ResidentImages:
    """All images decoded: as they are if all are squares of one size, else cut and resized."""
    modes, sizes = zip(*((image.mode, image.size) for image in images))
    mode = "L" if set(modes) <= {"1", "L"} else "RGB"
    stored = (functional.pil_to_tensor(image.convert(mode)) for image in images)
    if len(set(sizes)) > 1 or sizes[0][0] != sizes[0][1]:
        preprocess = replace(preprocess, image_size=preprocess.image_size or DEFAULT_IMAGE_SIZE)
        stored = (square(image, preprocess.image_size) for image in stored)
    return ResidentImages(name, torch.stack(list(stored)), labels, num_classes, preprocess, device)
