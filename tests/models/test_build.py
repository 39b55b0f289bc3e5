import pytest
import timm
import torch
from torch import nn

from dptrain.models import PAPER_MODELS, ModelError, build, preferences


def two_outputs(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))


def broken(num_classes, input_shape):
    raise KeyError("oops")


@pytest.mark.parametrize("alias", PAPER_MODELS)
def test_the_models_of_the_paper_are_known_to_timm(alias):
    assert timm.is_model_pretrained(PAPER_MODELS[alias])


def test_a_vit_is_built_at_any_size_and_number_of_channels():
    model = build("vit-tiny", 7, (1, 64, 64))
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


def test_a_name_almost_right_gets_a_hint():
    with pytest.raises(ModelError, match="did you mean vit-tiny"):
        build("vit-tinny", 10, (3, 224, 224))


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ModelError, match="cannot read inputs"):
        build("vit-tiny", 10, (3, 8, 8))


def test_a_factory_by_import_path():
    assert build(f"{__name__}:two_outputs", 2, (3, 4)).training
    with pytest.raises(ModelError, match=r"must give logits \[1, 5\]"):
        build(f"{__name__}:two_outputs", 5, (3, 4))
    with pytest.raises(ModelError, match="raised KeyError"):
        build(f"{__name__}:broken", 5, (3, 4))
    with pytest.raises(ModelError, match="Cannot import"):
        build("no_such_package:factory", 5, (3, 4))
    with pytest.raises(ModelError, match="not a function"):
        build("os:path", 5, (3, 4))


def test_small_networks_have_no_published_weights():
    with pytest.raises(ModelError, match="no published weights"):
        build("mlp", 10, (1, 8, 8), pretrained=True)


def test_preferences():
    assert preferences("vit-base").image_size == 224
    assert preferences("vit-base").mean == (0.5, 0.5, 0.5)
    assert preferences("convnet").image_size is None
