import torch

from dptrain.models import build
from dptrain.models.gabor import ANGLES, COUNT, gabor_bank


def test_the_filters_are_unlike_each_other_and_see_no_brightness():
    bank = gabor_bank(2).flatten(1)
    assert bank.shape == (COUNT, 2 * 49)
    assert torch.allclose(bank.sum(1), torch.zeros(COUNT), atol=1e-5)
    likeness = bank @ bank.T
    assert torch.allclose(likeness.diagonal(), torch.ones(COUNT))
    assert (likeness - torch.eye(COUNT)).abs().max() < 0.9


def test_a_quarter_turn_of_the_image_turns_the_filters():
    bank = gabor_bank(1).view(2, ANGLES, 2, 7, 7)
    turned = bank[:, 0, 0].rot90(1, (1, 2))
    assert torch.allclose(turned, bank[:, ANGLES // 2, 0], atol=1e-5)


def test_a_network_begins_with_them_and_trains_them():
    model = build("gabor-convnet", 10, (1, 28, 28))
    assert torch.equal(model.features[1].weight, gabor_bank(1))
    assert model.features[1].weight.requires_grad
