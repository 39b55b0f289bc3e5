from dataclasses import replace

import pytest
import torch

from dptrain.data import DataError, FeatureStore, Preprocess, ResidentImages


class Backbone:
    """Counts what it is asked for."""

    def __init__(self):
        self.rows = 0

    def __call__(self, inputs):
        self.rows += len(inputs)
        return inputs.flatten(1)[:, :3] * 2


@pytest.fixture
def backbone():
    return Backbone()


def images(labels=(0, 1, 0, 1), changed=0, preprocess=None):
    pixels = torch.arange(4 * 16, dtype=torch.uint8).view(4, 1, 4, 4).clone()
    pixels[2, 0, 0, 0] += changed
    return ResidentImages("x", pixels, torch.tensor(labels), 2, preprocess or Preprocess())


def test_what_is_kept_is_not_computed_again(tmp_path, backbone):
    store = FeatureStore(tmp_path / "new")
    made = store.features(images(), backbone, "one")
    kept = store.features(images(), backbone, "one")
    assert backbone.rows == 4
    assert torch.equal(made.rows, kept.rows)
    assert torch.equal(made.labels, kept.labels)
    assert (made.name, made.input_shape, made.num_classes) == (kept.name, kept.input_shape, kept.num_classes)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "other",
    [images(changed=1), images(labels=(1, 1, 0, 0)), images(preprocess=replace(Preprocess(), image_size=8))],
    ids=["a pixel", "labels", "preprocessing"],
)
def test_other_data_are_computed(tmp_path, backbone, other):
    store = FeatureStore(tmp_path)
    store.features(images(), backbone, "one")
    found = store.features(other, backbone, "one")
    assert torch.equal(found.rows, Backbone()(other.gather(torch.arange(4))[0]))
    assert backbone.rows == 8


def test_another_backbone_is_computed(tmp_path, backbone):
    store = FeatureStore(tmp_path)
    store.features(images(), backbone, "one")
    store.features(images(), backbone, "other")
    assert backbone.rows == 8


def test_no_folder_keeps_nothing(backbone):
    for _ in range(2):
        FeatureStore().features(images(), backbone, "one")
    assert backbone.rows == 8


def test_a_damaged_file_is_named(tmp_path, backbone):
    store = FeatureStore(tmp_path)
    store.features(images(), backbone, "one")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=rf"--keep-features: .*{path.name} cannot be used .* remove it"):
        store.features(images(), backbone, "one")
