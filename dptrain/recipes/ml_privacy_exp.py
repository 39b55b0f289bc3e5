"""The cost experiments of ml-privacy-exp (https://github.com/yc7z/ml-privacy-exp), a function for each.

Small networks on images of 32 pixels, of 10 classes: SimpleConvNet, LargerConvNet and VGG11; modes public,
opacus, functorch_dp and mixed ghost. Its report is of one 1080Ti with 11 GB.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dptrain.bench import Case
from dptrain.recipes.paper import CONVNET, of
from dptrain.recipes.study import Scale

MODELS = ("simple-convnet", "larger-convnet", "vgg11")
PUBLIC, OPACUS, FUNCTORCH = ("torch", "public"), ("opacus", "opacus"), ("opacus", "functorch_dp")
MIXED, OURS = ("torch", "mixed-ghost"), ("torch", "auto")
GTX_1080TI_GIB = 11.0
BATCH = 100


def _base(scale: Scale, **changes: Any) -> Case:
    if scale == "small":
        return replace(CONVNET, **changes)
    on_gpu: dict[str, Any] = {"device": "cuda", "batch_size": BATCH, "accumulate": 1, "seconds": 20.0}
    return replace(CONVNET, **(on_gpu | changes))


def dp_timing(scale: Scale) -> list[Case]:
    """Seconds of an epoch: the 50,000 examples of CIFAR-10 over the throughput."""
    ways = (PUBLIC, OPACUS, FUNCTORCH, MIXED, OURS)
    if scale == "small":
        rest = [c for m in MODELS[1:] for c in of(_base(scale, model=m), OPACUS, MIXED, OURS)]
        return of(_base(scale), *ways) + rest
    return [c for m in MODELS for c in of(_base(scale, model=m), *ways)]


def dp_runtime_profile(scale: Scale) -> list[Case]:
    models = MODELS[:1] if scale == "small" else MODELS
    ways = (OPACUS, FUNCTORCH, OURS)
    return [c for m in models for c in of(_base(scale, model=m), *ways, measure="profile")]


def dp_memory(scale: Scale) -> list[Case]:
    """Memory after gradient, clip and noise; on a GPU, the largest batches in 11 GB as well."""
    peaks = of(_base(scale, model="vgg11"), OPACUS, MIXED, OURS, measure="memory")
    if scale == "small":
        return peaks
    search = _base(scale, model="vgg11", measure="batch-size", memory_gib=GTX_1080TI_GIB, batch_size=64)
    return peaks + of(search, PUBLIC, OPACUS, MIXED, OURS)
