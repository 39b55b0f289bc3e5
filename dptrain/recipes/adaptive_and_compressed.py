"""The two accuracy experiments of ml-privacy-exp (https://github.com/yc7z/ml-privacy-exp), a function for
each.

Their variants, with what was wrong put right: clipping is flat over all parameters and noise follows its
sensitivity, batches are true Poisson samples, the sum is divided by the expected batch, and what has no
guarantee says so. Top-k compression, which its README promises beside the momenta, is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dptrain.bench import Case
from dptrain.recipes.study import Scale

MOMENTA = ("sgd", "accumulated-momentum", "running-momentum", "momentum")
KEEP = 0.01
PUBLIC_EXAMPLES = 600
SHORTER = 0.25
"""A clip norm for what is kept: the largest hundredth of the coordinates has about a quarter of the norm of a
gradient, as public examples tell."""
TOP_K = {"compress": "topk"}
PUBLIC = {"compress": "public-topk", "public_examples": PUBLIC_EXAMPLES}

#: of every variant; the learning rates are one for all variants of a study, as there
_SHARED: dict[str, Any] = {
    "data": "mnist",
    "logical_batch_size": 256,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "weight_average": 0.0,
    "evaluations": 10,
    "keep": KEEP,
}
#: about an epoch on 2 cores; 25 epochs on a GPU
_LENGTH: dict[Scale, dict[str, Any]] = {
    "small": {"steps": 250},
    "paper": {"epochs": 25.0},
}


def _case(scale: Scale, model: str, image_size: int, method: str, **settings: Any) -> Case:
    base = Case("accuracy", model=model, image_size=image_size, num_classes=10, accumulate=2, batch_size=128)
    if scale == "paper":
        base = replace(base, device="cuda", seeds=3, batch_size=512, accumulate=1)
    said = _SHARED | _LENGTH[scale] | {"image_size": image_size} | settings
    return replace(base, method=method, settings=tuple(said.items()))


def naive_momentum(scale: Scale) -> list[Case]:
    """LeNet-5 on MNIST by SGD and three momenta, each also with the largest 1 % of its noisy gradient."""

    def case(method: str, optimizer: str, **settings: Any) -> Case:
        return _case(scale, "lenet5", 32, method, lr=0.25, optimizer=optimizer, **settings)

    ways = (("non-private", "sgd"), *(("auto", name) for name in MOMENTA))
    return [case(*way, **compression) for way in ways for compression in ({}, TOP_K)]


def public_compress(scale: Scale) -> list[Case]:
    """SampleConvNet on MNIST by Adam: which 1 % of each tensor is kept, and who decides it."""

    def case(method: str, **settings: Any) -> Case:
        return _case(scale, "sample-convnet", 28, method, lr=0.0015, optimizer="adam", **settings)

    return [
        case("auto"),
        case("auto", **TOP_K),
        case("non-private", **TOP_K),
        case("auto", **PUBLIC),
        case("auto", **PUBLIC, compress_before_clipping=True),
        case("auto", **PUBLIC, compress_before_clipping=True, clip_norm=SHORTER),
        case("auto", compress="leaky-topk-no-guarantee"),
    ]
