"""Folders of shards: safetensors, Arrow and Parquet files, one of them damaged or not what it should be."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from benchmarks.fuzz import mutate, surroundings, trees
from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.files import Given
from benchmarks.fuzz.targets.images import PLAIN, STRANGE
from benchmarks.fuzz.targets.weights import TYPES, packed, unpacked
from dptrain.data import DataError, Preprocess, load

FORMATS = ("safetensors", "arrow", "parquet")
CLASSES = 3
ROWS = 9


@functools.cache
def seeds(form: str) -> tuple[bytes, ...]:
    """Sound shards of a format; the first are those that its neighbours are."""
    labels = np.arange(ROWS) % CLASSES
    if form == "safetensors":
        images = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 8, 8), dtype=np.uint8)
        inputs = images[:, 0].astype(np.float32)
        stated = {"num_classes": str(CLASSES)}
        return (
            save({"images": images, "labels": labels}, stated),
            save({"images": images, "labels": labels}),
            save({"inputs": inputs, "labels": labels.astype(np.uint8)}, stated),
        )
    encoded = [PLAIN[number % len(PLAIN)] for number in range(ROWS)]
    tables = [_table(encoded, labels), _table([*encoded[:-1], None], labels), _table(STRANGE[:ROWS], labels)]
    return tuple(content for table in tables for content in _written(table, form))


def _table(images, labels):
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array([{"bytes": content, "path": "/etc/passwd"} for content in images], kind)
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}, "image": {"_type": "Image"}}
    stated = {"huggingface": json.dumps({"info": {"features": features}})}
    form = pa.schema([("image", kind), ("label", pa.int64())], metadata=stated)
    return pa.table([values, pa.array(labels)], schema=form)


def _written(table, form: str) -> list[bytes]:
    """A table in each way that there is to write it."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    found = []
    if form == "parquet":
        for how in ({}, {"compression": "none", "use_dictionary": False}, {"compression": "zstd"}):
            file = io.BytesIO()
            write_table(table, file, row_group_size=4, **how)
            found.append(file.getvalue())
        return found
    packed_ = pa.ipc.IpcWriteOptions(compression="zstd")
    for new, options in ((pa.ipc.new_stream, None), (pa.ipc.new_file, None), (pa.ipc.new_stream, packed_)):
        file = io.BytesIO()
        with new(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=4)
        found.append(file.getvalue())
    return found


def _make(chance: random.Random) -> tuple[str, list[Given]]:
    """A format, and what stands in the places of two shards."""
    form = chance.choice(FORMATS)
    content = chance.choice(seeds(form))
    if form == "safetensors" and chance.random() < 0.5:
        header, data = unpacked(content)
        entry = header[chance.choice(sorted(header))]
        match chance.randrange(4):
            case 0 if "dtype" in entry:
                entry["dtype"] = chance.choice(TYPES)
            case 1 if "shape" in entry:
                entry["shape"] = chance.choice(
                    (entry["shape"][::-1], [1, *entry["shape"]], [0], [], [2**62, 4])
                )
            case 2:
                header["__metadata__"] = {"num_classes": str(trees.value(chance))}
            case _:
                header = trees.changed(chance, header)
        content = packed(chance, header, data)
    elif chance.random() < 0.8:
        content = mutate.damaged(chance, [content])
    whole = ("file", seeds(form)[0])
    return form, [whole, (surroundings.kind(chance), content)][chance.random() < 0.3 :]


def _feed(given: tuple[str, list[Given]], scratch: Path) -> None:
    form, shards = given
    root = scratch / "shards"
    surroundings.remove(root)
    for number, (kind, content) in enumerate(shards):
        surroundings.put(root / f"train/{number}.{form}", content, kind)
    train = load(f"shards:{root}", preprocess=Preprocess(image_size=8), workers=0).train
    for part in torch.arange(min(len(train), 64)).split(5):
        inputs, labels = train.gather(part)
        if len(labels) != len(part) or not 0 <= int(labels.min()) <= int(labels.max()) < train.num_classes:
            raise Wrong("labels that are no classes were given.")
        if inputs.shape != (len(part), *train.input_shape) or inputs.dtype != torch.float32:
            raise Wrong("inputs of another shape were given.")


TARGETS = (Target("shards", _make, _feed, (DataError,), 200),)
