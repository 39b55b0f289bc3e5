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
    """ViT-Tiny at 224 pixels, its head only, on features computed once, all examples in every step.

    Needs --weights or --pretrained. The learning rate is that for epsilon 8; docs/accuracy.md has those for
    less.
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
        logical_batch_size=8_000,
        physical_batch_size=2_000,
        epochs=None,
        steps=30,
        lr=2.0,
        optimizer="momentum",
        weight_average=0.0,
    )


def vit_tiny_cifar100_last_block() -> TrainConfig:
    """ViT-Tiny at 224 pixels: its last block and head, four passes. The eleven blocks before are run once per
    example. Needs --weights or --pretrained. docs/accuracy.md has learning rates for less than epsilon 8.
    """
    return replace(
        vit_tiny_cifar100_full(),
        image_size=224,
        frozen_blocks=11,
        cache_features=True,
        physical_batch_size=64,
        epochs=4,
        lr=2.0,
    )


def vit_tiny_cifar100_last_biases() -> TrainConfig:
    """`vit_tiny_cifar100_last_block` with the block's biases and the head only."""
    return replace(vit_tiny_cifar100_last_block(), trainable="bias")


def vit_tiny_cifar100_last_lora() -> TrainConfig:
    """`vit_tiny_cifar100_last_block` with adapters of rank 8 and the head only. Needs dptrain[lora]."""
    return replace(vit_tiny_cifar100_last_block(), trainable="lora")


def vit_tiny_cifar100_full() -> TrainConfig:
    """ViT-Tiny at 96 pixels, all parameters, one pass over the data. Needs --weights or --pretrained."""
    return TrainConfig(
        data="cifar100",
        model="vit-tiny",
        image_size=96,
        epsilon=8.0,
        delta=1e-5,
        clip_norm=1.0,
        logical_batch_size=2_000,
        physical_batch_size=32,
        epochs=1,
        steps=None,
        lr=1.5,
        optimizer="momentum",
        weight_average=0.0,
    )


def vit_tiny_cifar100_bias() -> TrainConfig:
    """`vit_tiny_cifar100_full` with biases and head only (BitFit)."""
    return replace(vit_tiny_cifar100_full(), trainable="bias")


def vit_tiny_cifar100_lora() -> TrainConfig:
    """`vit_tiny_cifar100_full` with adapters of rank 8 and the head only. Needs dptrain[lora]."""
    return replace(vit_tiny_cifar100_full(), trainable="lora")
