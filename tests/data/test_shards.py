"""Sharded data are read by index, like any other, and what is wrong with them is said at once."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, physical_batches
from dptrain.core.spec import Sampling
from dptrain.data import DataError, Dataset, Preprocess, load
from dptrain.data.sharded import Sharded
from tests.data.shard_files import CLASSES, FORMATS, SIDE, folder, pictures, png, schema, write

pytest.importorskip("pyarrow")
AS_STORED = Preprocess(SIDE, (0.0,), (1.0,))


def opened(path, preprocess=AS_STORED, **how):
    return load(f"shards:{path}", preprocess=preprocess, **how)


def expected(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("form", FORMATS)
def test_examples_are_those_that_were_written(tmp_path, form):
    path, images, labels = folder(tmp_path, form)
    splits = opened(path)
    assert isinstance(splits.train, Dataset)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (20, 5, CLASSES)
    assert splits.input_shape == (3, SIDE, SIDE) and splits.test_name == "test"
    at = torch.tensor([19, 0, 7, 6, 8, 0, 0, 12])  # over all shards, unordered, with repeats
    inputs, found = splits.train.gather(at)
    assert inputs.dtype == torch.float32 and found.dtype == torch.int64
    torch.testing.assert_close(inputs, expected(images)[at])
    assert found.tolist() == [labels[index] for index in at.tolist()]
    assert splits.train.labels.tolist() == labels
    nothing, none = splits.train.gather(torch.empty(0, dtype=torch.int64))
    assert nothing.shape == (0, 3, SIDE, SIDE) and len(none) == 0
    with pytest.raises(IndexError, match="has 20 examples"):
        splits.train.gather(torch.tensor([20]))
    with pytest.raises(IndexError, match="has 20 examples"):
        splits.train.gather(torch.tensor([-1]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_that_are_read_ahead_are_the_gathered_ones_in_order(tmp_path, form, workers):
    path, images, labels = folder(tmp_path, form)
    train = opened(path, workers=workers).train
    sampler = LogicalSampler(20, Sampling("poisson", 0.4), Key.from_seed(0))
    pieces = [p for step in range(6) for p in physical_batches(sampler.sample(step), 3)]
    batches = list(train.stream(torch.from_numpy(piece.indices) for piece in pieces))
    assert len(batches) == len(pieces) > 10
    for (inputs, found), piece in zip(batches, pieces):
        torch.testing.assert_close(inputs, expected(images)[piece.indices])
        assert found.tolist() == np.array(labels)[piece.indices].tolist()


@pytest.mark.parametrize("form", FORMATS)
def test_a_subset_has_the_chosen_examples_only(tmp_path, form):
    path, images, labels = folder(tmp_path, form)
    part = opened(path).train.subset(torch.tensor([3, 8, 15, 19])).subset(torch.tensor([1, 3]))
    assert len(part) == 2 and part.labels.tolist() == [labels[8], labels[19]]
    inputs, _ = part.gather(torch.tensor([1, 0]))
    torch.testing.assert_close(inputs, expected(images)[[19, 8]])
    with pytest.raises(IndexError, match="has 2 examples"):
        part.gather(torch.tensor([2]))


def test_inputs_of_floating_point_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 4, 2)).astype(np.float16)
    (tmp_path / "train").mkdir()
    save_file({"inputs": values, "labels": np.arange(9, dtype=np.uint8)}, tmp_path / "train/a.safetensors")
    splits = opened(tmp_path)
    assert (splits.num_classes, splits.input_shape, splits.test) == (9, (4, 2), None)
    inputs, labels = splits.train.gather(torch.tensor([8, 2]))
    assert torch.equal(inputs, torch.from_numpy(values[[8, 2]]).float()) and labels.tolist() == [8, 2]
    assert splits.train.stand_in(3)[0].shape == (3, 4, 2)


def test_raw_images_are_resized_as_the_model_wants(tmp_path):
    path, _, _ = folder(tmp_path, "safetensors")
    train = opened(path, Preprocess(image_size=12)).train
    assert train.input_shape == (3, 12, 12) and train.gather(torch.arange(3))[0].shape == (3, 3, 12, 12)


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_classes_that_no_file_states_are_counted(tmp_path, form):
    path, _, _ = folder(tmp_path, form, num_classes=None)
    assert opened(path).num_classes == CLASSES


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = pictures(10)
    rows = {"image": [Image.fromarray(image) for image in images], "label": [i % 3 for i in range(10)]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=4))
    every = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict(train=every, validation=every.select([0, 9]))
    parts.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1})
    (tmp_path / "saved/train/cache-1234.arrow").write_bytes(b"not one of its files")
    every.to_parquet(tmp_path / "hub/train-00000-of-00001.parquet")
    every.select([0, 9]).to_parquet(tmp_path / "hub/validation-00000-of-00001.parquet")
    for folder_name in ("saved", "hub"):
        splits = opened(tmp_path / folder_name)
        assert (len(splits.train), len(splits.test), splits.num_classes) == (10, 2, 4)
        assert splits.test_name == "validation"
        torch.testing.assert_close(splits.train.gather(torch.arange(10))[0], expected(images))


def test_an_error_of_a_worker_comes_in_its_place(tmp_path):
    rows = [png(image) for image in pictures(12)]
    rows[9] = rows[9][:-30]
    path = write(tmp_path / "train/part.parquet", rows, [0, 1, 2] * 4).parent.parent
    stream = opened(path, workers=2).train.stream(iter(torch.arange(12).split(2)))
    for _ in range(4):
        next(stream)
    with pytest.raises(DataError, match=r"^[^\n]*part.parquet, row 9, is not a readable image[^\n]*it.$"):
        next(stream)


def test_an_unfinished_stream_stops_its_threads(tmp_path):
    train = opened(folder(tmp_path, "arrow")[0], workers=3).train
    stream = train.stream(torch.zeros(4, dtype=torch.int64) for _ in range(1000))
    next(stream)
    assert any(thread.name.startswith("dptrain-read") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("dptrain-read") for thread in threading.enumerate())


class Endless:
    """A quarter of a billion examples that are made when they are asked for."""

    path, size, stored_shape, is_image, num_classes = "endless", 250_000_000, (1, 2, 2), True, 10

    def read(self, rows):
        labels = torch.from_numpy(rows % 10)
        return labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2), labels

    def labels(self):
        raise AssertionError("training needs no labels but those of its batches.")


def test_a_billion_examples_take_no_memory_of_their_own():
    train = Sharded("endless", [Endless()] * 4, 10, Preprocess(), workers=2)
    sampler = LogicalSampler(len(train), Sampling("poisson", 1e-6), Key.from_seed(0))
    tracemalloc.start()
    pieces = list(physical_batches(sampler.sample(0), 64))
    batches = list(train.stream(torch.from_numpy(piece.indices) for piece in pieces))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(train) == 10**9 and peak < 5e6
    for (_, labels), piece in zip(batches, pieces):
        assert labels.tolist() == (piece.indices % 10).tolist()
    with pytest.raises(DataError, match=r"labels of 1,000,000,000 examples .* into a folder test/"):
        _ = train.labels


# What is wrong


def damaged(path, form):
    path, _, _ = folder(path, form)
    (shard,) = path.glob("train/part-2.*")
    return path, shard


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_are_named_before_a_run(tmp_path, form):
    path, shard = damaged(tmp_path, form)
    content = shard.read_bytes()
    for wrong in (b"", content[:50], content[: len(content) // 2], content[:-8], content[9:], b"x" * 300):
        shard.write_bytes(wrong)
        with pytest.raises(DataError, match=r"^[^\n]*part-2[^\n]*\.$"):
            opened(path)


@pytest.mark.parametrize("form", FORMATS)
def test_shards_that_do_not_belong_together_are_refused(tmp_path, form):
    path, shard = damaged(tmp_path, form)
    write(shard, pictures(3), [0, 1, 2], num_classes=CLASSES + 1)
    with pytest.raises(DataError, match=r"part-2.* states 4 classes and .*part-0.* 3"):
        opened(path)
    write(shard, pictures(3), [0, 1, CLASSES])
    with pytest.raises(DataError, match=r"part-2.* has the label 3, but there are 3 classes"):
        opened(path)
    write(shard, pictures(3), [0, 1, -1])
    with pytest.raises(DataError, match=r"part-2.* has the label -1"):
        opened(path)
    write(shard, pictures(0), [])
    with pytest.raises(DataError, match=r"part-2"):
        opened(path)


@pytest.mark.parametrize("form", ["arrow", "arrow-file", "parquet"])
def test_rows_without_an_image_or_a_label_are_named(tmp_path, form):
    path, shard = damaged(tmp_path, form)
    write(shard, [png(pictures(1)[0]), None], [0, 1])
    with pytest.raises(DataError, match=r"part-2.*row 1 has no image, or only the place where it once was"):
        opened(path).train.gather(torch.tensor([9]))
    write(shard, [png(pictures(1)[0])] * 2, [0, None])
    with pytest.raises(DataError, match=r"part-2.* has 1 rows without a label"):
        opened(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds nothing; a shard holds labels, and either"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8)}, "holds images; a shard holds labels, and either"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "images must be uint8 of shape"),
        ({"images": np.zeros((2, 1, 4, 4), np.float32)}, "images must be uint8 of shape"),
        ({"inputs": np.zeros((2, 4), np.int64)}, "inputs must be of floating point"),
        ({"inputs": np.zeros((3, 4), np.float32)}, "one label, an integer, for each of 3 examples"),
        ({"inputs": np.zeros((2, 0), np.float32)}, "hold nothing, or too much at once"),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensors, message):
    labels = {"labels": np.arange(2)} if len(tensors) and message[:12] != "holds images" else {}
    (tmp_path / "train").mkdir()
    save_file(tensors | labels, tmp_path / "train/a.safetensors")
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_columns_of_another_kind_are_refused(tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (tmp_path / "train").mkdir()
    shard = tmp_path / "train/a.parquet"
    image, text = pa.array([b"x", b"y"]), pa.array(["x", "y"])
    for columns, message in (
        ({"text": text, "label": pa.array([0, 1])}, "has no columns of encoded images among 'text', 'label'"),
        ({"a": image, "b": image, "label": pa.array([0, 1])}, "has 2 columns of encoded images"),
        ({"a": image, "kind": text}, "give --label-column, one of integers, of which there is none"),
        ({"a": image, "b": pa.array([0, 1]), "c": pa.array([0, 1])}, "give --label-column, one of 'b', 'c'"),
    ):
        write_table(pa.table(columns), shard)
        with pytest.raises(DataError, match=message):
            opened(tmp_path)


def test_files_that_could_only_be_read_whole_are_refused(tmp_path, monkeypatch):
    import pyarrow as pa

    table = pa.table([[{"bytes": b"x" * 999, "path": None}] * 9, [0] * 9], schema=schema())
    (tmp_path / "train").mkdir()
    packed = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(str(tmp_path / "train/a.arrow"), table.schema, options=packed) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="is compressed, and would be unpacked whole"):
        opened(tmp_path)
    path, _, _ = folder(tmp_path, "parquet")
    monkeypatch.setattr("dptrain.data.arrow_shard.LARGEST_ROW_GROUP", 100)
    with pytest.raises(DataError, match="has row groups of more than"):
        opened(path)


def test_folders_that_hold_no_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match="There is no folder 'nowhere'"):
        load("shards:nowhere")
    with pytest.raises(DataError, match="There is no folder ''"):
        load("shards:")
    with pytest.raises(DataError, match=r"has no training examples; put files \.safetensors"):
        opened(tmp_path)
    path, _, _ = folder(tmp_path, "parquet")
    (path / "train/more.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="has files of several formats"):
        opened(path)
    (path / "train/more.arrow").unlink()
    (path / "train/state.json").write_text('{"_data_files": [{"filename": "../../../etc/passwd"}]}')
    with pytest.raises(DataError, match="train/passwd"):
        opened(path)
    (path / "train/state.json").write_text('{"_data_files": 3}')
    with pytest.raises(DataError, match="does not list the files of a data set"):
        opened(path)
