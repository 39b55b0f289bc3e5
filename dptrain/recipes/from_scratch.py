"""Models trained from random weights."""

from __future__ import annotations

from dataclasses import replace

from dptrain.training import TrainConfig


def mnist_convnet() -> TrainConfig:
    """A small ConvNet on MNIST at epsilon 2.93, delta 1e-5, all of its features learned.

    Papernot et al. 2021, "Tempered sigmoid activations for deep learning with differential privacy", report
    98.1 % at that budget, under looser sampling. The settings were chosen on a validation split of the
    training set; `mnist_scattering` is better.
    """
    return TrainConfig(
        data="mnist",
        model="lenet-norm",
        epsilon=2.93,
        delta=1e-5,
        clip_norm=0.1,
        logical_batch_size=4096,
        physical_batch_size=256,
        epochs=60,
        steps=None,
        lr=3.0,
        optimizer="momentum",
        weight_average=0.99,
    )


def mnist_scattering_linear() -> TrainConfig:
    """Logistic regression on the scattering coefficients of MNIST at epsilon 2.93, delta 1e-5.

    The pipeline of Tramèr and Boneh 2021, "Differentially private learning needs better features (or much
    more data)", who report 98.7 % at that budget. Needs dptrain[scattering]. The settings were chosen on a
    validation split of the training set (docs/accuracy.md).
    """
    return TrainConfig(
        data="mnist",
        normalization="none",
        features="scattering",
        model="norm-linear",
        epsilon=2.93,
        delta=1e-5,
        clip_norm=3.0,
        logical_batch_size=4096,
        physical_batch_size=2048,
        epochs=45,
        steps=None,
        lr=0.25,
        optimizer="momentum",
        weight_average=0.95,
    )


def mnist_scattering() -> TrainConfig:
    """`mnist_scattering_linear` with a small convolution, which is learned, before the linear layer."""
    return replace(
        mnist_scattering_linear(),
        model="norm-convnet",
        clip_norm=1.0,
        physical_batch_size=512,
        epochs=20,
        lr=1.0,
    )


def mnist_epsilon_1() -> TrainConfig:
    """`mnist_scattering` at epsilon 1, with smaller steps because there is more noise in them."""
    return replace(mnist_scattering(), epsilon=1.0, lr=0.4)
