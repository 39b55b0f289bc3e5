"""Scattering coefficients: wavelet features that no data has shaped.

Bruna and Mallat 2013, "Invariant scattering convolution networks"; for private training Tramèr and Boneh
2021, "Differentially private learning needs better features (or much more data)".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dptrain.data.feature_store import FeatureStore
from dptrain.data.features import Features
from dptrain.data.protocol import DataError, Dataset, Splits

SCALES, ANGLES = 2, 8
"""J and L of both papers: wavelets of two octaves in eight directions."""

PATHS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2
"""Coefficients per place and colour, of order 0, 1 and 2: 81."""

SMALLEST = 2 ** (SCALES + 1)
"""Pixels per side: two coefficients, and no wavelet wider than the image."""

BATCH_SIZE = 256
"""Images that are transformed at once."""


def scattered(splits: Splits, store: FeatureStore, device: torch.device | str = "cpu") -> Splits:
    """The same examples as coefficients [PATHS * C, H // 4, W // 4], computed now and kept on `device`.

    Raises DataError as `scattering` and `store` do.
    """
    transform = scattering(splits.train.input_shape, device)

    def coefficients(part: Dataset) -> Features:
        return store.features(part, transform, f"scattering {SCALES} {ANGLES}", BATCH_SIZE)

    test = None if splits.test is None else coefficients(splits.test)
    return replace(splits, train=coefficients(splits.train), test=test)


def scattering(
    input_shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A fixed function from images [B, C, H, W] to their coefficients [B, C * PATHS, H // 4, W // 4].

    The wavelets are constants and each image is transformed by itself, so that training on the coefficients
    is as private as training on the images. Colours are transformed one by one.

    Raises DataError where there are no images, or too small ones, or no kymatio.
    """
    if len(input_shape) != 3:
        raise DataError(
            f"--features scattering is made of images, but one input has shape {list(input_shape)}: leave it "
            "out."
        )
    _, height, width = input_shape
    if min(height, width) < SMALLEST:
        raise DataError(
            f"--features scattering needs images of at least {SMALLEST} x {SMALLEST} pixels, and these have "
            f"{height} x {width}: raise --image-size."
        )
    try:
        # Not kymatio.torch: its part for volumes asks scipy for a function that is no longer there.
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
    except ImportError as error:
        raise DataError(
            f"--features scattering needs kymatio, which cannot be imported ({error}): pip install "
            "'dptrain[scattering]'."
        ) from error
    transform = ScatteringTorch2D(J=SCALES, shape=(height, width), L=ANGLES).to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        coefficients: torch.Tensor = transform(images.contiguous())  # [B, C, PATHS, H', W']
        return coefficients.flatten(1, 2)

    return features
