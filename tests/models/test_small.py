import pytest
import torch

from dptrain.models import SMALL, ModelError, build

SHAPES = {
    "convnet": (1, 8, 8),
    "mlp": (1, 8, 8),
    "linear": (5,),
    "lenet": (1, 28, 28),
    "lenet-tanh": (1, 28, 28),
    "lenet-norm": (1, 28, 28),
}


@pytest.mark.parametrize("name", SMALL)
def test_builds_without_batch_normalisation(name):
    shape = SHAPES.get(name, (3, 32, 32))
    model = build(name, 7, shape)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())
    assert not any("Lazy" in type(module).__name__ for module in model.modules())
    assert "head.weight" in dict(model.named_parameters())


def test_the_lenet_of_the_tutorials_has_its_size():
    assert sum(p.numel() for p in build("lenet", 10, (1, 28, 28)).parameters()) == 26_010


def test_too_small_images_are_refused():
    with pytest.raises(ModelError, match="needs larger images"):
        build("vgg11", 10, (3, 8, 8))


def test_vectors_need_a_vector_model():
    with pytest.raises(ModelError, match="use mlp or linear"):
        build("convnet", 10, (64,))
