"""Operations that the engine computes otherwise than PyTorch does."""

from __future__ import annotations

import pytest
import torch

from dptrain.torch.functions import _to_images


@pytest.mark.parametrize("size", [1, 5, 6, 7])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups, padding", [(1, 0), (2, 0), (1, 1)])
def test_images_of_strided_pointwise_convolutions(dims, size, groups, padding):
    torch.manual_seed(0)
    images = torch.randn(3, 4, *[size] * dims, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, *[1] * dims, dtype=torch.float64)
    stride = [3, 2, 1][:dims]
    options = stride, [padding] * dims, [1] * dims, False, [0] * dims, groups
    out = torch.convolution(images, weight, None, *options)
    g = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, images, g)
    found = _to_images(g, images.detach(), weight, *options)
    torch.testing.assert_close(found, want)
    assert found.stride() == images.stride()
