import pytest
import torch

from dptrain.data import DataError, load


def test_reads_gzipped_and_plain_files(mnist_dir):
    splits = load("mnist", mnist_dir)
    assert (len(splits.train), len(splits.test)) == (20, 10)
    images, labels = splits.train.gather(torch.arange(20))
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_a_cut_gzip_file_is_refused(mnist_dir):
    path = mnist_dir / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated or damaged"):
        load("mnist", mnist_dir)


def test_a_file_shorter_than_announced_is_refused(mnist_dir):
    path = mnist_dir / "MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="announces 20 bytes but holds 19"):
        load("mnist", mnist_dir)


def test_another_format_is_refused(mnist_dir):
    (mnist_dir / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(b"GIF89a, not IDX")
    with pytest.raises(DataError, match="not an IDX file"):
        load("mnist", mnist_dir)


def test_labels_of_another_length_are_refused(mnist_dir):
    raw = mnist_dir / "MNIST/raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="20 images but 10 labels"):
        load("mnist", mnist_dir)


def test_a_label_out_of_range_is_refused(mnist_dir):
    path = mnist_dir / "MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))
    with pytest.raises(DataError, match="labels run from 0 to 10, but there are 10 classes"):
        load("mnist", mnist_dir)


def test_absent_files_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"not found under .*--download"):
        load("fashion-mnist", tmp_path)


def test_the_environment_names_the_data_directory(mnist_dir, monkeypatch):
    monkeypatch.setenv("DPTRAIN_DATA", str(mnist_dir))
    assert len(load("mnist").train) == 20
