"""Gabor wavelets, for a first convolution to begin with.

What the first layer of a network for images learns is much like them (Krizhevsky, Sutskever and Hinton
2012, figure 3). Under noise it learns little and slowly, so it pays to begin there: they are constants, which
no data shaped.
"""

from __future__ import annotations

import math

import torch

ANGLES = 8
SCALES = ((1.2, 1.6), (2.0, 0.9))
"""Of each octave: standard deviation of the envelope in pixels, frequency of the wave in radians a pixel."""
PHASES = (0.0, math.pi / 2)
SLANT = 0.7
"""How much longer the envelope is along the crest of the wave: 1 / SLANT times."""

COUNT = len(SCALES) * ANGLES * len(PHASES)
"""Filters in the bank: 32."""


def gabor_bank(channels: int, size: int = 7) -> torch.Tensor:
    """Filters [COUNT, channels, size, size] float32, of mean zero and norm 1, the same for every channel.

    exp(-(u^2 + (s v)^2) / 2 d^2) cos(f u + phase), where (u, v) are the coordinates turned by the angle; less
    the part of the envelope that makes the mean zero.
    """
    middle = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    bank = []
    for deviation, frequency in SCALES:
        for angle in (math.pi * k / ANGLES for k in range(ANGLES)):
            u = x * math.cos(angle) + y * math.sin(angle)
            v = y * math.cos(angle) - x * math.sin(angle)
            envelope = torch.exp(-(u**2 + (SLANT * v) ** 2) / (2 * deviation**2))
            for phase in PHASES:
                wave = envelope * torch.cos(frequency * u + phase)
                wave -= envelope * wave.sum() / envelope.sum()
                bank.append(wave.expand(channels, size, size))
    filters = torch.stack(bank)
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
