"""What a model wants its images to look like."""

from __future__ import annotations

from dataclasses import dataclass

import timm

from dptrain.models.names import timm_name


@dataclass(frozen=True)
class Preferences:
    """Image size in pixels (None: any), normalisation and interpolation a model was made for."""

    image_size: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"


def preferences(name: str) -> Preferences:
    """Preferences of a model by name, without building it; the neutral ones if it states none."""
    resolved = timm_name(name)
    config = timm.get_pretrained_cfg(resolved) if timm.is_model(resolved) else None
    if config is None:
        return Preferences()
    # A crop is not offered, so that timm's crop_pct plays no part.
    interpolation = config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preferences(config.input_size[-1], tuple(config.mean), tuple(config.std), interpolation)
