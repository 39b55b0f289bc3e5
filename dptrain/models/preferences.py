"""What a model wants its inputs to look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm

from dptrain.models.names import timm_name
from dptrain.models.transformers_classifier import PREFIX, is_huggingface, read_config


@dataclass(frozen=True)
class Preferences:
    """Image size in pixels (None: any), normalisation and interpolation a model was made for.

    Of a model of texts: its tokenizer, by name or path, and the most tokens it can read.
    """

    image_size: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"
    tokenizer: str | None = None
    max_length: int | None = None


def preferences(name: str) -> Preferences:
    """Preferences of a model by name, without building it; the neutral ones if it states none."""
    if is_huggingface(name):
        return _of_huggingface(name)
    resolved = timm_name(name)
    config = timm.get_pretrained_cfg(resolved) if timm.is_model(resolved) else None
    if config is None:
        return Preferences()
    # A crop is not offered, so that timm's crop_pct plays no part.
    interpolation = config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preferences(config.input_size[-1], tuple(config.mean), tuple(config.std), interpolation)


def _of_huggingface(name: str) -> Preferences:
    source, config = name.removeprefix(PREFIX), read_config(name)
    if hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None)
        return _of_images(source, size if isinstance(size, int) else None)
    longest = getattr(config, "max_position_embeddings", None)
    is_length = isinstance(longest, int) and longest > 0
    return Preferences(tokenizer=source, max_length=longest if is_length else None)


def _of_images(source: str, image_size: int | None) -> Preferences:
    """What the image processor stored beside the model states, if there is one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        stated: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except Exception:  # none, or a damaged one
        return Preferences(image_size)
    size = stated.get("size")
    if image_size is None:
        sizes = size.values() if isinstance(size, dict) else [size]
        image_size = next((value for value in sizes if isinstance(value, int)), None)
    mean, std = (_numbers(stated.get(key)) for key in ("image_mean", "image_std"))
    return Preferences(image_size, mean, std)


def _numbers(stated: Any) -> tuple[float, ...]:
    """One number for each channel; one half where nothing of the kind is stated."""
    is_list = isinstance(stated, list) and stated and all(type(v) in (int, float) for v in stated)
    return tuple(stated) if is_list else (0.5,)
