"""A model for JAX by its name, and timm's weights for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from safetensors.numpy import load_file

from ..names import timm_name
from .bit import LAYERS, BiTResNet
from .parameters import Parameters
from .vit import ViT

SIZES = {
    "tiny": ViT(192, 12, 3),
    "small": ViT(384, 12, 6),
    "base": ViT(768, 12, 12),
    "large": ViT(1024, 24, 16),
    "huge": ViT(1280, 32, 16),
}

#: other names for the same architectures
ALIASES = {"google/vit-base-patch16-224-in21k": "vit_base_patch16_224"}


def architecture(name: str, classes: int, image_size: int | None = None) -> ViT | BiTResNet:
    """The architecture that timm, or the paper (arXiv 2406.17298), calls ``name``.

    Args:
        classes: of the head.
        image_size: pixels along the side of an image, in place of the name's.

    Raises:
        ValueError: there is none for JAX; the message says which there are.
    """
    known = timm_name(ALIASES.get(name, name)).split(".")[0]
    if found := re.fullmatch(r"vit_(tiny|small|base|large|huge)_patch(\d+)_(\d+)", known):
        size, patch, side = found[1], int(found[2]), image_size or int(found[3])
        if side % patch:
            raise ValueError(f"images of {side} pixels cannot be cut into patches of {patch}.")
        return replace(SIZES[size], patch=patch, image_size=side, classes=classes)
    if (found := re.fullmatch(r"resnetv2_(\d+)x(\d)_bit", known)) and int(found[1]) in LAYERS:
        return BiTResNet(int(found[1]), int(found[2]), classes)
    raise ValueError(
        f"there is no model {name!r} for JAX: take vit_SIZE_patchP_224 (tiny, small, base, large, huge), "
        "resnetv2_DEPTHxWIDTH_bit (50, 101, 152), or bring a loss function of your own to dptrain.jax."
    )


def load(model: ViT | BiTResNet, path: str | Path, fresh: Parameters) -> Parameters:
    """The weights of a safetensors file of timm's, in float32.

    Args:
        fresh: random parameters, taken for the head where the file's has another number of classes.

    Raises:
        ValueError: the file lacks a parameter or has one of another shape.
    """
    stored = load_file(path)
    out: dict[str, Array] = {}
    for name, shape in model.shapes().items():
        found = stored.get(name)
        if found is not None and found.shape == shape:
            out[name] = jnp.asarray(found, jnp.float32)
        elif name.startswith("head."):
            out[name] = fresh[name]
        else:
            what = "lacks it" if found is None else f"has {found.shape} in its place"
            raise ValueError(f"the model needs {name} of shape {shape}, but {path} {what}.")
    return out
