"""The model that a configuration describes, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dptrain import torch as dpt
from dptrain.data import ResidentTexts, Splits
from dptrain.data.sources import default_data_dir
from dptrain.models import Text, WeightReport, add_lora, build_with_report, in_first_blocks
from dptrain.training.config import TrainConfig


@dataclass(frozen=True)
class Made:
    """A model on the CPU, and what was done to make it."""

    model: nn.Module
    weights: WeightReport | None
    conversion: dpt.ConversionReport | None


def make_model(config: TrainConfig, splits: Splits) -> Made:
    """Build, load, convert, add adapters; random values come from torch's global generator.

    Raises ModelError.
    """
    text = _text(splits)
    model, weights = build_with_report(
        config.model, splits.num_classes, splits.input_shape, config.pretrained, _weights(config), text
    )
    conversion = None
    if config.convert:
        model, conversion = dpt.convert(model, in_place=True)
    if config.trainable == "lora":
        example = splits.train.stand_in(1)[0]
        on_cpu = {k: v.cpu() for k, v in example.items()} if isinstance(example, dict) else example.cpu()
        add_lora(model, config.lora_rank, config.lora_alpha, on_cpu, frozen(config, model))
    return Made(model, weights, conversion)


def frozen(config: TrainConfig, model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter, by its name, is frozen whatever --trainable says.

    Raises ModelError.
    """
    return in_first_blocks(model, config.frozen_blocks) if config.frozen_blocks else lambda name: False


def _weights(config: TrainConfig) -> Path | None:
    """The file of weights, looked for where we are and then beside the data."""
    if config.weights is None or config.weights.exists():
        return config.weights
    beside_the_data = (config.data_dir or default_data_dir()) / config.weights
    return beside_the_data if beside_the_data.exists() else config.weights


def _text(splits: Splits) -> Text | None:
    """What a model of these data must know of their tokens, if they are texts."""
    if not isinstance(splits.train, ResidentTexts):
        return None
    encoder = splits.train.encoder
    example = {name: tokens.cpu() for name, tokens in splits.train.stand_in(1)[0].items()}
    return Text(example, encoder.vocabulary, encoder.pad_token)
