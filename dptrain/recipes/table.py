"""Recipes by name: each is a function that returns a configuration."""

from __future__ import annotations

from collections.abc import Callable

from dptrain.recipes import fine_tuning, from_scratch
from dptrain.training import ConfigError, TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "mnist-convnet": from_scratch.mnist_convnet,
    "mnist-scattering": from_scratch.mnist_scattering,
    "mnist-scattering-linear": from_scratch.mnist_scattering_linear,
    "mnist-epsilon-1": from_scratch.mnist_epsilon_1,
    "vit-base-cifar100": fine_tuning.vit_base_cifar100,
    "bit-resnet-cifar100": fine_tuning.bit_resnet_cifar100,
    "vit-tiny-cifar100-head": fine_tuning.vit_tiny_cifar100_head,
    "vit-tiny-cifar100-last-block": fine_tuning.vit_tiny_cifar100_last_block,
    "vit-tiny-cifar100-last-biases": fine_tuning.vit_tiny_cifar100_last_biases,
    "vit-tiny-cifar100-last-lora": fine_tuning.vit_tiny_cifar100_last_lora,
    "vit-tiny-cifar100-bias": fine_tuning.vit_tiny_cifar100_bias,
    "vit-tiny-cifar100-lora": fine_tuning.vit_tiny_cifar100_lora,
    "vit-tiny-cifar100-full": fine_tuning.vit_tiny_cifar100_full,
}


def recipe(name: str) -> TrainConfig:
    """The configuration called `name`. Raises ConfigError if there is none."""
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {name!r}; choose from {', '.join(RECIPES)}.")
    return RECIPES[name]()
