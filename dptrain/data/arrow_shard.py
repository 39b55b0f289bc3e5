"""Shards of encoded images beside their labels, in the Arrow and the Parquet format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dptrain.core.files import MIB, Unreadable, parse_json, size_of
from dptrain.core.printable import reason
from dptrain.data.decode import decode_bytes
from dptrain.data.protocol import DataError
from dptrain.data.sharded import Rows

ARROW, PARQUET = ".arrow", ".parquet"
LARGEST_FILE = 2**50
LARGEST_ROW_GROUP = 256 * MIB
"""Of a Parquet file, unpacked: it is read whole for each of its rows."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
USUAL_LABELS = ("label", "labels")


@dataclass(frozen=True)
class Layout:
    """The two columns that are read, and how many classes the file says there are."""

    image: str
    label: str
    num_classes: int | None


@dataclass(frozen=True)
class ArrowShard:
    """An Arrow file or stream, such as `datasets` writes, mapped for as long as a read takes."""

    path: str
    size: int
    stored_shape: tuple[int, ...]
    layout: Layout
    is_image: bool = True

    @property
    def num_classes(self) -> int | None:
        return self.layout.num_classes

    @classmethod
    def open(cls, path: str, image_size: int, label: str | None) -> ArrowShard:
        """The shard in a file, of which only the layout is read. Raises DataError."""
        with _mapped(path) as (source, table):
            layout = _layout(path, table.schema, label)
            source.seek(0)
            whole = source.read_buffer()
            for chunk in table.column(layout.image).chunks:
                if not all(_within(whole, buffer) for buffer in chunk.buffers()):
                    raise DataError(f"{path} is compressed, and would be unpacked whole; write it without.")
            size = len(table)
        return cls(path, _some(path, size), (3, image_size, image_size), layout)

    def read(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        with _mapped(self.path) as (_, table):
            return _stacked(
                _examples(self.path, table, self.layout, rows, 0), self.stored_shape[-1], self.path
            )

    def labels(self) -> torch.Tensor:
        with _mapped(self.path) as (_, table):
            return _all_labels(self.path, table.column(self.layout.label))


@dataclass(frozen=True)
class ParquetShard:
    """A Parquet file. Of each row that is wanted its whole row group is read: these had better be small."""

    path: str
    size: int
    stored_shape: tuple[int, ...]
    layout: Layout
    ends: Rows
    """Where each row group ends, in rows of the file."""
    is_image: bool = True

    @property
    def num_classes(self) -> int | None:
        return self.layout.num_classes

    @classmethod
    def open(cls, path: str, image_size: int, label: str | None) -> ParquetShard:
        """The shard in a file, of which only the end is read. Raises DataError."""
        with _parquet(path) as file:
            layout = _layout(path, file.schema_arrow, label)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        if any(size_bytes > LARGEST_ROW_GROUP for _, size_bytes in sizes):
            raise DataError(
                f"{path} has row groups of more than {LARGEST_ROW_GROUP // MIB} MiB, and each is read whole "
                "for any of its rows; write smaller ones, or Arrow files by save_to_disk of datasets."
            )
        if any(rows < 0 for rows, _ in sizes):
            raise DataError(f"{path} has a row group of less than no rows; write it again.")
        ends = np.cumsum([rows for rows, _ in sizes], dtype=np.int64)
        size = int(ends[-1]) if len(ends) else 0
        return cls(path, _some(path, size), (3, image_size, image_size), layout, ends)

    def read(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        with _parquet(self.path) as file:
            return _stacked(self._groups(file, rows), self.stored_shape[-1], self.path)

    def _groups(self, file: Any, rows: Rows) -> Iterator[tuple[int, bytes, int]]:
        holders = np.searchsorted(self.ends, rows, side="right")
        for holder in np.unique(holders):
            columns = [self.layout.image, self.layout.label]
            table = file.read_row_group(int(holder), columns=columns, use_threads=False)
            start = int(self.ends[holder]) - len(table)
            yield from _examples(self.path, table, self.layout, rows[holders == holder] - start, start)

    def labels(self) -> torch.Tensor:
        with _parquet(self.path) as file:
            return _all_labels(self.path, file.read(columns=[self.layout.label]).column(0))


def _layout(path: str, schema: Any, wanted: str | None) -> Layout:
    """The only column of encoded images, and that of class numbers."""
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_image(kind: Any) -> bool:
        if not pa.types.is_struct(kind):
            return is_binary(kind)
        return any(
            kind.field(i).name == "bytes" and is_binary(kind.field(i).type) for i in range(kind.num_fields)
        )

    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path} has two columns of one name; write it again.")
    images = [field.name for field in schema if is_image(field.type)]
    if len(images) != 1:
        raise DataError(
            f"{path} has {len(images) or 'no'} columns of encoded images among {_listed(schema.names)}; it "
            "needs one, of bytes or as Image of datasets stores them (texts are read by --data hf:PATH)."
        )
    numbers = [field.name for field in schema if pa.types.is_integer(field.type)]
    label = wanted if wanted is not None else next((name for name in USUAL_LABELS if name in numbers), None)
    if label is None and len(numbers) == 1:
        label = numbers[0]
    if label is None or label not in numbers:
        raise DataError(
            f"{path}: which column holds the class numbers is not clear; give --label-column, one of "
            f"{_listed(numbers) or 'integers, of which there is none'}."
        )
    return Layout(images[0], label, _stated_classes(schema, label))


def _stated_classes(schema: Any, label: str) -> int | None:
    """How many classes the features have that `datasets` writes into a schema."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"].decode())["info"]["features"]
        names = features[label]["names"]
        return len(names) if isinstance(names, list) else None
    except (Unreadable, UnicodeDecodeError, LookupError, TypeError):
        return None


def _examples(
    path: str, table: Any, layout: Layout, rows: Rows, start: int
) -> Iterator[tuple[int, bytes, int]]:
    """(row of the file, encoded image, label) of the `rows` of a table that begins at row `start`."""
    table = table.select([layout.image, layout.label])
    for row in rows.tolist():
        if row >= len(table):
            raise DataError(f"{path} has lost rows since the run began; restore it.")
        example = table.slice(row, 1)
        example.validate(full=True)  # offsets of a damaged file lead anywhere
        image, label = (column[0] for column in example.columns)
        if isinstance(image, Mapping) and image.is_valid:
            image = image["bytes"]
        if not image.is_valid or not label.is_valid:
            missing = "label" if image.is_valid else "image, or only the place where it once was"
            raise DataError(f"{path}: row {start + row} has no {missing}; complete or remove it.")
        yield start + row, image.as_py(), label.as_py()


def _stacked(
    examples: Iterable[tuple[int, bytes, int]], image_size: int, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = [], []
    for row, content, label in examples:
        images.append(decode_bytes(content, f"{path}, row {row},", image_size))
        labels.append(min(label, 2**63 - 1))  # an unsigned one may be larger, and is no class
    return torch.stack(images), torch.tensor(labels)


def _all_labels(path: str, column: Any) -> torch.Tensor:
    column.validate(full=True)
    if column.null_count:
        raise DataError(f"{path} has {column.null_count} rows without a label; complete or remove them.")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _within(whole: Any, buffer: Any) -> bool:
    """Whether a buffer is a part of the mapped file."""
    return buffer is None or buffer.size == 0 or whole.address <= buffer.address <= whole.address + whole.size


def _some(path: str, size: int) -> int:
    if size == 0:
        raise DataError(f"{path} holds no examples; remove it.")
    return size


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5]))


@contextmanager
def _mapped(path: str) -> Iterator[tuple[Any, Any]]:
    """The memory map of an Arrow file or stream, and its table, nothing of which is copied."""
    with _readable(path, "Arrow") as pa, pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(max(0, source.size() - len(END_OF_STREAM)))
        if not is_file and source.read() != END_OF_STREAM:
            raise Unreadable("has no end: it was cut off")  # at a batch, which the reader would not notice
        source.seek(0)
        with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
            table = reader.read_all()
        table.validate()
        yield source, table


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    with _readable(path, "Parquet"):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file


@contextmanager
def _readable(path: str, kind: str) -> Iterator[Any]:
    """pyarrow; whatever it raises of damaged files is one sentence."""
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(
            f"{kind} files need the package pyarrow; install it with `pip install 'dptrain[transformers]'`."
        ) from error
    try:
        size_of(path, LARGEST_FILE)
        yield pa
    except DataError:
        raise
    except Unreadable as error:
        raise DataError(f"{path} {error}; repair or remove it.") from error
    except Exception as error:
        raise DataError(f"{path} is not a readable {kind} file ({reason(error)}); write it again.") from error
