"""Small networks without batch normalisation, each built for any number of channels and pixels.

Every factory takes (num_classes, input_shape = (channels, height, width)) and returns a module that
maps [B, C, H, W] to logits [B, num_classes]. The last layer is always called `head`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from dptrain.models import gabor
from dptrain.models.errors import ModelError

InputShape = tuple[int, ...]


def mlp(num_classes: int, input_shape: InputShape, width: int = 128) -> nn.Sequential:
    """One hidden layer of `width` tanh units; takes inputs of any shape."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(math.prod(input_shape), width),
            act=nn.Tanh(),
            head=nn.Linear(width, num_classes),
        )
    )


def linear(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Multinomial logistic regression on inputs of any shape."""
    return nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), head=nn.Linear(math.prod(input_shape), num_classes))
    )


def norm_linear(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Logistic regression on channels [C, H, W] that are normalised in threes, within each example.

    For scattering coefficients (Tramèr and Boneh 2021, who take 27 groups of the 81 channels): those of the
    second order are far smaller than the others, and would hardly take part. Normalisation has no parameters
    and reads one example, so it costs no privacy.
    """
    _require_images("norm-linear", input_shape)
    return _with_head("norm-linear", _in_threes(input_shape), nn.Sequential(), num_classes, input_shape)


def norm_convnet(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """`norm_linear` with a convolution to 32 channels, group normalisation and GELU before the head.

    Learned features on fixed ones: 39,114 parameters on scattering coefficients of 28 x 28 x 1.
    """
    _require_images("norm-convnet", input_shape)
    features = nn.Sequential(
        _in_threes(input_shape),
        nn.Conv2d(input_shape[0], 32, kernel_size=3, padding=1),
        nn.GroupNorm(8, 32),
        nn.GELU(),
    )
    return _with_head("norm-convnet", features, nn.Sequential(), num_classes, input_shape)


def convnet(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Blocks of convolution, group normalisation, GELU and pooling, and a linear head.

    There is a block for each halving until at most 7 pixels are left: one for digits of 8 pixels,
    two for 28. Few parameters mean little noise; normalisation within each example keeps the
    per-example gradients even, so that clipping distorts them little.
    """
    _require_images("convnet", input_shape)
    channels, size = input_shape[0], min(input_shape[1:])
    layers: list[nn.Module] = [nn.LayerNorm(list(input_shape), elementwise_affine=False)]
    for width in (32, 64, 128, 128, 128):
        layers += [
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.GroupNorm(width // 8, width),
            nn.GELU(),
            nn.MaxPool2d(2),
        ]
        channels, size = width, size // 2
        if size <= 7:
            break
    return _with_head("convnet", nn.Sequential(*layers), nn.Sequential(), num_classes, input_shape)


def lenet(num_classes: int, input_shape: InputShape, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """The LeNet-style network of DP-SGD tutorials (26,010 parameters on 28 x 28 x 1)."""
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 16, kernel_size=8, stride=2, padding=3),
        act(),
        nn.MaxPool2d(kernel_size=2, stride=1),
        nn.Conv2d(16, 32, kernel_size=4, stride=2),
        act(),
        nn.MaxPool2d(kernel_size=2, stride=1),
    )
    return _with_head("lenet", features, _dense([32], act), num_classes, input_shape)


def lenet_tanh(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """`lenet` with tanh in place of ReLU (Papernot et al. 2021)."""
    return lenet(num_classes, input_shape, nn.Tanh)


def lenet_norm(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """LeNet's convolutions with group normalisation and GELU, and a linear head.

    Fewer parameters than `lenet` (10,650 on 28 x 28 x 1) and faster convergence.
    """
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 16, kernel_size=8, stride=2, padding=3),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=4),
        nn.GroupNorm(4, 32),
        nn.GELU(),
        nn.MaxPool2d(2),
    )
    return _with_head("lenet-norm", features, nn.Sequential(), num_classes, input_shape)


def gabor_convnet(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Two convolutions with group normalisation and GELU, and a linear head; all of it is trained.

    The first begins as Gabor wavelets (`dptrain.models.gabor`). 26,666 parameters on 28 x 28 x 1.
    """
    _require_images("gabor-convnet", input_shape)
    first = nn.Conv2d(input_shape[0], gabor.COUNT, kernel_size=7, stride=2, padding=3)
    with torch.no_grad():
        first.weight.copy_(gabor.gabor_bank(input_shape[0]))
        nn.init.zeros_(first.bias)
    features = nn.Sequential(
        nn.LayerNorm(list(input_shape), elementwise_affine=False),
        first,
        nn.GroupNorm(8, gabor.COUNT),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(gabor.COUNT, 32, kernel_size=3, padding=1),
        nn.GroupNorm(8, 32),
        nn.GELU(),
    )
    return _with_head("gabor-convnet", features, nn.Sequential(), num_classes, input_shape)


def lenet5(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """LeNet-5 with tanh and average pooling, for 32 x 32 pixels."""
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 6, kernel_size=5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, kernel_size=5),
        nn.Tanh(),
    )
    return _with_head("lenet5", features, _dense([84], nn.Tanh), num_classes, input_shape)


def simple_convnet(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Two convolutions and three dense layers, for 32 x 32 pixels."""
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 6, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return _with_head("simple-convnet", features, _dense([120, 84], nn.ReLU), num_classes, input_shape)


def larger_convnet(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """Four convolutions of 32, 64, 64 and 128 channels with average pooling and a linear head."""
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for index, width in enumerate((32, 64, 64, 128)):
        layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU()]
        layers.append(nn.AvgPool2d(2) if index < 3 else nn.AdaptiveAvgPool2d(1))
        channels = width
    return _with_head("larger-convnet", nn.Sequential(*layers), nn.Sequential(), num_classes, input_shape)


def vgg11(num_classes: int, input_shape: InputShape) -> nn.Sequential:
    """VGG-11 without batch normalisation or dropout, for 32 x 32 pixels or more."""
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, int(width), kernel_size=3, padding=1), nn.ReLU()]
            channels = int(width)
    return _with_head("vgg11", nn.Sequential(*layers), _dense([4096], nn.ReLU), num_classes, input_shape)


SMALL: dict[str, Callable[[int, InputShape], nn.Module]] = {
    "linear": linear,
    "norm-linear": norm_linear,
    "norm-convnet": norm_convnet,
    "mlp": mlp,
    "convnet": convnet,
    "lenet": lenet,
    "sample-convnet": lenet,  # as Opacus's MNIST example calls it
    "lenet-tanh": lenet_tanh,
    "lenet-norm": lenet_norm,
    "gabor-convnet": gabor_convnet,
    "lenet5": lenet5,
    "simple-convnet": simple_convnet,
    "larger-convnet": larger_convnet,
    "vgg11": vgg11,
}


def _in_threes(input_shape: InputShape) -> nn.GroupNorm:
    channels = input_shape[0]
    return nn.GroupNorm(channels // 3 if channels % 3 == 0 else channels, channels, affine=False)


def _dense(widths: list[int], act: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(layer for width in widths for layer in (nn.LazyLinear(width), act())))


def _require_images(name: str, input_shape: InputShape) -> None:
    if len(input_shape) != 3:
        raise ModelError(
            f"{name} reads images [C, H, W], but one input has shape {list(input_shape)}; use mlp or linear."
        )


def _with_head(
    name: str, features: nn.Module, dense: nn.Module, num_classes: int, input_shape: InputShape
) -> nn.Sequential:
    _require_images(name, input_shape)
    model = nn.Sequential(
        OrderedDict(features=features, flatten=nn.Flatten(), dense=dense, head=nn.LazyLinear(num_classes))
    )
    try:
        # One pass over a blank image gives the lazy layers their widths.
        with torch.no_grad():
            model(torch.zeros(1, *input_shape))
    except RuntimeError as error:
        raise ModelError(
            f"{name} needs larger images than {input_shape[1]} x {input_shape[2]}; raise --image-size."
        ) from error
    return model
