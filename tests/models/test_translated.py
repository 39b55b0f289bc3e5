"""Networks of layers, as functions for JAX: the logits of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dptrain.models import ModelError
from dptrain.models.small import SMALL

jax = pytest.importorskip("jax")


def compare(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    from dptrain.models.jax import translated

    model = model.eval()
    forward = translated(model, name, 5, shape)
    parameters = {n: jax.numpy.asarray(p.detach().numpy()) for n, p in model.named_parameters()}
    inputs = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    found = jax.jit(jax.vmap(forward, (None, 0)))(parameters, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_small_networks(name):
    torch.manual_seed(0)
    shape = (3, 32, 32)
    model = SMALL[name](5, shape)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    compare(model, name, shape)


def test_layers_with_options():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=2, groups=2, bias=False),
        nn.GroupNorm(3, 6, affine=False),
        nn.GELU("tanh"),
        nn.LayerNorm(9, bias=False),
        nn.AvgPool2d(3, stride=2),
        nn.Dropout(),
        nn.Sequential(),
        nn.Flatten(),
        nn.Linear(6 * 2 * 4, 5, bias=False),
    )
    compare(model, "mine", (4, 13, 17))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding="same"), nn.MaxPool2d(2, padding=1), nn.Softmax()]
)
def test_other_layers_are_refused(layer):
    from dptrain.models.jax import translated

    with pytest.raises(ModelError, match=type(layer).__name__):
        translated(nn.Sequential(layer), "mine", 5, (3, 8, 8))
