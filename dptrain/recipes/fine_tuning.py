"""Pre-trained models fine-tuned on CIFAR-100."""

from __future__ import annotations

from dataclasses import replace

from dptrain.training import TrainConfig

PAPER = TrainConfig(
    data="cifar100",
    image_size=224,
    pretrained=True,
    epsilon=8.0,
    delta=2.04e-5,
    logical_batch_size=25_000,
    epochs=2,
    steps=None,
    optimizer="adam",
    weight_average=0.0,
)
"""What the runs of arXiv 2406.17298 share: q = 1/2 on CIFAR-100's 50,000 examples, four steps."""


def vit_base_cifar100() -> TrainConfig:
    """The paper's ViT-Base: all parameters, clip norm 4.63."""
    return replace(PAPER, model="vit-base", clip_norm=4.63, lr=3e-4)


def bit_resnet_cifar100() -> TrainConfig:
    """The paper's BiT-ResNet-50x1: all parameters, clip norm 6.53."""
    return replace(PAPER, model="bit-50x1", clip_norm=6.53, lr=9.8e-4)


def vit_tiny_cifar100_head() -> TrainConfig:
    """ViT-Tiny at 224 pixels, its head only, on features computed once.

    Needs --weights or --pretrained.
    """
    return TrainConfig(
        data="cifar100",
        model="vit-tiny",
        image_size=224,
        trainable="head",
        cache_features=True,
        epsilon=8.0,
        delta=1e-5,
        clip_norm=1.0,
        logical_batch_size=6_400,
        epochs=None,
        steps=60,
        lr=0.5,
        optimizer="momentum",
    )


def vit_tiny_cifar100_full() -> TrainConfig:
    """ViT-Tiny at 64 pixels, all parameters. Needs --weights or --pretrained."""
    return TrainConfig(
        data="cifar100",
        model="vit-tiny",
        image_size=64,
        epsilon=8.0,
        delta=1e-5,
        clip_norm=1.0,
        logical_batch_size=2_000,
        epochs=20,
        steps=None,
        lr=1e-3,
        lr_schedule="linear",
        optimizer="adam",
    )
