"""From stored uint8 images to what a model reads, on the compute device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

Interpolation = Literal["bilinear", "bicubic"]

HALF = 0.5
"""Mean and standard deviation that send [0, 1] to [-1, 1]. They are fixed, never computed from the
images: statistics of private data would have to be paid for."""


@dataclass(frozen=True)
class Preprocess:
    """Scale to [0, 1], resize to a square, normalise per channel.

    `image_size` in pixels (None: as stored), `mean` and `std` per channel or one for all.
    """

    image_size: int | None = None
    mean: tuple[float, ...] = (HALF,)
    std: tuple[float, ...] = (HALF,)
    interpolation: Interpolation = "bicubic"
    full_scale: float = 255.0
    """The stored value that means 1."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}: give a positive number of pixels.")
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise ValueError("Normalisation needs as many means as standard deviations, all positive.")

    def output_shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of one processed image for a stored image [C, H, W]."""
        channels, height, width = stored
        if len(self.mean) not in (1, channels) and channels != 1:
            raise ValueError(
                f"Normalisation has {len(self.mean)} channels and the images have {channels}: "
                "give one value or one per channel."
            )
        if self.image_size is None:
            return channels, height, width
        return channels, self.image_size, self.image_size

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Stored images [B, C, H, W] uint8 to float32 [B, C, image_size, image_size]."""
        x = images.to(torch.float32) / self.full_scale
        size = self.image_size
        if size is not None and x.shape[-2:] != (size, size):
            x = functional.interpolate(x, (size, size), mode=self.interpolation, antialias=True).clamp_(0, 1)
        return (x - _per_channel(self.mean, x)) / _per_channel(self.std, x)


def _per_channel(values: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """`values` as [1, C or 1, 1, 1]; for grey images, the mean over the colours."""
    chosen = values if len(values) in (1, x.shape[1]) else (sum(values) / len(values),)
    return torch.tensor(chosen, device=x.device).view(1, -1, 1, 1)
