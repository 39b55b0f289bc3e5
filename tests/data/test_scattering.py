import sys

import pytest
import torch

from dptrain.data import DataError, FeatureStore, load, scattered
from dptrain.data.scattering import PATHS, scattering


@pytest.fixture
def kymatio():
    pytest.importorskip("kymatio", reason="scattering features need kymatio")


def test_each_image_is_transformed_by_itself(kymatio):
    """Else one example would move the features of others, whom no clipping would protect."""
    torch.manual_seed(0)
    images = torch.rand(5, 1, 16, 12)
    transform = scattering((1, 16, 12))
    before = transform(images)
    assert before.shape == (5, PATHS, 4, 3)
    assert torch.allclose(torch.cat([transform(image[None]) for image in images]), before, atol=1e-6)
    images[3] *= 100
    after = transform(images)
    assert torch.equal(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert not torch.equal(after[3], before[3])


def test_colours_are_transformed_one_by_one(kymatio):
    images = torch.rand(2, 3, 8, 8)
    whole, grey = scattering((3, 8, 8))(images), scattering((1, 8, 8))
    assert torch.allclose(whole[:, PATHS : 2 * PATHS], grey(images[:, 1:2]), atol=1e-6)


def test_it_takes_the_place_of_the_images(kymatio):
    images = load("digits")
    splits = scattered(images, FeatureStore())
    assert splits.input_shape == splits.test.input_shape == (PATHS, 2, 2)
    assert len(splits.train) == len(images.train)
    rows, labels = splits.train.gather(torch.tensor([7]))
    stored, expected = images.train.gather(torch.tensor([7]))
    assert torch.allclose(rows, scattering((1, 8, 8))(stored), atol=1e-6)
    assert torch.equal(labels, expected)


def test_without_kymatio_one_sentence_says_what_to_do(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "kymatio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kymatio", None)
    with pytest.raises(DataError, match=r"needs kymatio, .* pip install 'dptrain\[scattering\]'"):
        scattering((1, 28, 28))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5,), r"made of images, but one input has shape \[5\]"), ((1, 28, 7), "at least 8 x 8 pixels")],
)
def test_what_cannot_be_scattered_is_refused(shape, message):
    with pytest.raises(DataError, match=message):
        scattering(shape)
