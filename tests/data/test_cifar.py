import os

import numpy as np
import pytest
import torch

from dptrain.data import DataError, load
from dptrain.data.cifar import CIFAR10


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


def test_pickles_are_not_read_whatever_their_checksum(tmp_path):
    folder = tmp_path / CIFAR10.pickled_folder
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cbuiltins\nexit\n(tR.")
    with pytest.raises(DataError, match=r"holds pickles, which can run code and are not read.*--download"):
        load("cifar10", tmp_path)


def test_a_file_larger_than_any_is_refused_before_memory_is_taken(cifar100_dir):
    os.truncate(cifar100_dir / "cifar-100-binary/train.bin", 3074 * 2**30)
    with pytest.raises(DataError, match="bytes, more than the"):
        load("cifar100", cifar100_dir)
