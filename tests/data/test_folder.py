from pathlib import Path

import pytest
import torch
from PIL import Image

from dptrain.data import DataError, Preprocess, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            directory = tmp_path / split / label
            directory.mkdir(parents=True)
            for index in range(count // 2):
                Image.new("RGB", (20 + index, 30), colour).save(directory / f"{index}.png")
    return tmp_path


def test_reads_classes_and_resizes(folder):
    splits = load(str(folder), preprocess=Preprocess(image_size=16), workers=0)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (6, 2, 2)
    images, labels = splits.train.gather(torch.tensor([5, 0]))
    assert images.shape == (2, 3, 16, 16)
    assert labels.tolist() == [1, 0]
    assert images[0, 0].min() == 1 and images[0, 2].max() == -1


def test_workers_give_the_batches_in_order(folder):
    train = load(str(folder), preprocess=Preprocess(image_size=16), workers=1).train
    batches = [torch.tensor([0, 5]), torch.tensor([3]), torch.tensor([0, 0])]
    streamed = list(train.stream(iter(batches)))
    assert len(streamed) == 3
    for (images, labels), indices in zip(streamed, batches, strict=True):
        expected, expected_labels = train.gather(indices)
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_a_damaged_image_is_named(folder):
    path = folder / "train/red/0.png"
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red/0.png is not a readable image"):
        load(str(folder))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_cut_off_is_named_in_one_sentence(folder, workers):
    path = folder / "train/red/0.png"
    path.write_bytes(path.read_bytes()[:-30])
    train = load(str(folder), preprocess=Preprocess(image_size=16), workers=workers).train
    with pytest.raises(DataError, match=r"^[^\n]*red/0.png is not a readable image[^\n]*remove it.$"):
        list(train.stream(iter([torch.arange(6)])))


def test_classes_must_agree(folder):
    (folder / "train/green").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train/green/0.png")
    with pytest.raises(DataError, match=r"classes of train/ and val/ differ \('green'\)"):
        load(str(folder))


def test_a_folder_without_splits_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder train/"):
        load(str(tmp_path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match="digits, mnist"):
        load("no-such-data")
