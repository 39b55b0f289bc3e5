"""Models trained from random weights."""

from __future__ import annotations

from dptrain.training import TrainConfig


def mnist_convnet() -> TrainConfig:
    """A small tanh ConvNet on MNIST at epsilon 2.93, delta 1e-5.

    Papernot et al. 2021 report 98.1 % at that budget, under looser sampling.
    """
    return TrainConfig(
        data="mnist",
        model="lenet-tanh",
        epsilon=2.93,
        delta=1e-5,
        clip_norm=0.5,
        logical_batch_size=1024,
        physical_batch_size=256,
        epochs=30,
        steps=None,
        lr=1.0,
        lr_schedule="linear",
        optimizer="momentum",
        weight_average=0.95,
    )
