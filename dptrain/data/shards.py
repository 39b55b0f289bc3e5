"""Data sets of any size: `shards:PATH`, a folder of safetensors, Arrow or Parquet files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dptrain.core.files import Unreadable, read_json
from dptrain.data.arrow_shard import ARROW, PARQUET, ArrowShard, ParquetShard
from dptrain.data.decode import DEFAULT_IMAGE_SIZE
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import DataError, Splits
from dptrain.data.safetensors_shard import NUMBER_OF_CLASSES, SUFFIX, SafetensorsShard
from dptrain.data.sharded import Shard, Sharded, checked

PREFIX = "shards:"
TRAIN, TESTS = "train", ("test", "validation", "val")
SUFFIXES = (SUFFIX, ARROW, PARQUET)
MOST_CLASSES = 2**24
LOOKED_AT = 2**24
"""Up to how many examples all labels are checked before a run; of more, those of the batches are."""
STATE = "state.json"
"""In which `datasets` lists the files of a data set: others beside them are its caches."""


def load_shards(
    name: str,
    root: Path,
    label_column: str | None,
    preprocess: Preprocess,
    device: torch.device | str,
    workers: int | None,
) -> Splits:
    """The shards of the training examples and of those to evaluate on. Raises DataError.

    They lie in the folders train/ and test/ (validation/, val/); or in one folder, with names that begin so;
    or all are training examples. Every file's layout is looked at, and no example.
    """
    source = name.removeprefix(PREFIX)
    path = next((path for path in (Path(source), root / source) if source and os.path.isdir(path)), None)
    if path is None:
        raise DataError(f"There is no folder {source!r}; give shards: and the path of a folder of shards.")
    files = _splits(path)
    opened = {
        split: [_open(file, preprocess, label_column) for file in found] for split, found in files.items()
    }
    num_classes = _agreed([shard for shards in opened.values() for shard in shards])
    if opened[TRAIN][0].is_image and not isinstance(opened[TRAIN][0], SafetensorsShard):
        preprocess = replace(preprocess, image_size=opened[TRAIN][0].stored_shape[-1])
    made = {
        split: Sharded(f"{path.name} {split}", shards, num_classes, preprocess, device, workers)
        for split, shards in opened.items()
    }
    test = next((split for split in made if split != TRAIN), None)
    return Splits(made[TRAIN], made[test] if test else None, test or "test")


def _splits(path: Path) -> dict[str, list[Path]]:
    """Files of the split train and of the first other one that there is."""
    if (path / TRAIN).is_dir():
        found = {split: _shards(path / split) for split in (TRAIN, *TESTS) if (path / split).is_dir()}
    else:
        every = _shards(path)
        found = {
            split: [file for file in every if file.name.startswith(split)] for split in (TRAIN, *TESTS[:2])
        }
        if not found[TRAIN]:
            found = {TRAIN: every}
    if not found[TRAIN]:
        raise DataError(f"{path} has no training examples; put files {_suffixes()} into {path.name}/{TRAIN}.")
    test = next((split for split in TESTS if found.get(split)), None)
    return {split: found[split] for split in (TRAIN, test) if split}


def _shards(folder: Path) -> list[Path]:
    """The shards in a folder, in the order of their names, which is that of the indices."""
    try:
        names = sorted(name for name in os.listdir(folder) if Path(name).suffix in SUFFIXES)
        if STATE in os.listdir(folder):
            listed = read_json(folder / STATE)["_data_files"]
            names = [name for name in (Path(file["filename"]).name for file in listed) if name]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions.") from error
    except (Unreadable, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{folder / STATE} does not list the files of a data set; save it again.") from error
    if len({Path(name).suffix for name in names}) > 1:
        raise DataError(f"{folder} has files of several formats ({_suffixes()}); keep those of one.")
    return [folder / name for name in names]


def _open(path: Path, preprocess: Preprocess, label_column: str | None) -> Shard:
    if path.suffix == SUFFIX:
        return SafetensorsShard.open(str(path))
    kind: Callable[..., Shard] = ParquetShard.open if path.suffix == PARQUET else ArrowShard.open
    return kind(str(path), preprocess.image_size or DEFAULT_IMAGE_SIZE, label_column)


def _agreed(shards: Sequence[Shard]) -> int:
    """How many classes there are; refuses shards that do not belong together."""
    first = shards[0]
    for shard in shards:
        if (shard.stored_shape, shard.is_image) != (first.stored_shape, first.is_image):
            raise DataError(
                f"{shard.path} has examples of shape {list(shard.stored_shape)} and {first.path} of shape "
                f"{list(first.stored_shape)}; shards of one data set are alike."
            )
        if shard.num_classes != first.num_classes:
            raise DataError(
                f"{shard.path} states {shard.num_classes or 'no number of'} classes and {first.path} "
                f"{first.num_classes or 'none'}; shards of one data set are alike."
            )
    # Without a statement all labels are looked at: which classes there are counts as public.
    classes = first.num_classes or 1 + max(int(shard.labels().max()) for shard in shards)
    if not 2 <= classes <= MOST_CLASSES:
        raise DataError(
            f"{first.path} and the shards beside it have {classes:,} classes by their labels or "
            f"{NUMBER_OF_CLASSES}; correct them: there are at least 2 and at most {MOST_CLASSES:,}."
        )
    if sum(shard.size for shard in shards) <= LOOKED_AT:
        for shard in shards:
            checked(shard, shard.labels(), classes)
    return classes


def _suffixes() -> str:
    return ", ".join(SUFFIXES)
