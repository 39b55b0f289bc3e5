import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from dptrain.data import DataError, load
from dptrain.data.cifar import read_verified_pickle
from dptrain.data.download import md5_of


class Bomb:
    """Unpickling an instance is noticed."""

    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_reads_binary_records_with_fine_labels(cifar100_dir):
    splits = load("cifar100", cifar100_dir)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (6, 4, 100)
    images, labels = splits.train.gather(torch.arange(6))
    assert labels.tolist() == [90, 91, 92, 93, 94, 95]
    assert (images[:, 0] == 1).all() and (images[:, 1:] == -1).all()


def test_a_truncated_binary_file_is_refused(cifar100_dir):
    path = cifar100_dir / "cifar-100-binary/train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a whole number of 3074-byte records"):
        load("cifar100", cifar100_dir)


def test_a_wrong_label_is_refused(cifar100_dir):
    path = cifar100_dir / "cifar-100-binary/test.bin"
    content = bytearray(path.read_bytes())
    content[1] = 100
    path.write_bytes(content)
    with pytest.raises(DataError, match="labels run from"):
        load("cifar100", cifar100_dir)


def test_cifar10_binary_batches_are_joined(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        np.zeros((2, 3073), dtype=np.uint8).tofile(folder / name)
    assert len(load("cifar10", tmp_path).train) == 10
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3.bin is missing"):
        load("cifar10", tmp_path)


def test_a_pickle_without_the_published_checksum_is_never_opened(tmp_path):
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    for file, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        (folder / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not unpickled"):
        load("cifar10", tmp_path)
    assert not Bomb.exploded


def test_a_pickle_with_its_checksum_is_read(tmp_path):
    content = pickle.dumps({"data": [[1]], "labels": [0]})
    path = tmp_path / "batch"
    path.write_bytes(content)
    assert read_verified_pickle(path, md5_of(content)) == {"data": [[1]], "labels": [0]}
