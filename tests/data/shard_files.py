"""Small shards in every format, and the examples that they hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

FORMATS = ("safetensors", "arrow", "arrow-file", "parquet")
SIDE, CLASSES = 6, 3


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, SIDE, SIDE, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def schema(num_classes: int | None = CLASSES):
    """Of Arrow and Parquet files, as `datasets` writes it."""
    import json

    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = [str(number) for number in range(num_classes or 0)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    stated = {"huggingface": json.dumps({"info": {"features": features}})} if num_classes else None
    return pa.schema([("image", image), ("label", pa.int64())], metadata=stated)


def write(
    path: Path,
    rows: np.ndarray | list[bytes | None],
    labels: list[int | None],
    num_classes: int | None = CLASSES,
) -> Path:
    """A shard of pictures, or of the bytes that are to stand for them; its format is in the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        images = np.ascontiguousarray(np.asarray(rows).transpose(0, 3, 1, 2))
        stated = {"num_classes": str(num_classes)} if num_classes else None
        save_file({"images": images, "labels": np.array(labels)}, path, stated)
        return path
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    form, encoded = schema(num_classes), [png(r) if isinstance(r, np.ndarray) else r for r in rows]
    values = [{"bytes": content, "path": None} for content in encoded]
    table = pa.table([pa.array(values, form[0].type), pa.array(labels, pa.int64())], schema=form)
    if path.suffix == ".parquet":
        with ParquetWriter(path, form) as writer:
            writer.write_table(table, row_group_size=4)
        return path
    # A stream is what `datasets` writes.
    new = pa.ipc.new_file if path.parent.parent.name == "arrow-file" else pa.ipc.new_stream
    with new(str(path), form) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def folder(
    root: Path, form: str, sizes: tuple[int, ...] = (7, 1, 12), num_classes: int | None = CLASSES
) -> tuple[Path, np.ndarray, list[int]]:
    """A folder of shards, train/ and test/; the pictures and labels of train/ in order."""
    suffix = form.split("-")[0]
    every, labels = pictures(sum(sizes)), [number % CLASSES for number in range(sum(sizes))]
    ends = np.cumsum(sizes)
    for number, (end, size) in enumerate(zip(ends, sizes)):
        part = slice(end - size, end)
        write(root / form / f"train/part-{number}.{suffix}", every[part], labels[part], num_classes)
    write(root / form / f"test/part-0.{suffix}", pictures(5, seed=1), [0, 1, 2, 0, 1], num_classes)
    return root / form, every, labels
