"""Numbers of the paper, arXiv 2406.17298, and of the report of ml-privacy-exp, beside which ours are put."""

from __future__ import annotations

from collections.abc import Mapping

from dptrain.report.reading import Record

#: Table 1: millions of parameters
PARAMETERS_M: Mapping[str, float] = {
    "vit-tiny": 5.7,
    "vit-small": 22.1,
    "vit-base": 86.6,
    "vit-large": 304.3,
    "vit-huge": 630.8,
    "bit-50x1": 23.7,
    "bit-101x1": 42.7,
    "bit-50x3": 211.8,
    "bit-101x3": 382.4,
    "bit-152x4": 929.2,
}

#: Table 2: largest physical batch of ViT-Base, on V100 (32 GB) and A100 (40 GB)
LARGEST_BATCH: Mapping[str, tuple[int, int]] = {
    "non-private": (216, 268),
    "per-example": (28, 35),
    "ghost": (203, 257),
    "mixed-ghost": (203, 257),
    "bk-ghost": (189, 209),
    "bk-mixed-ghost": (189, 209),
    "bk-mix-opt": (189, 209),
}

#: Figure 5: throughput of an A100 over that of a V100
A100_OVER_V100, A100_OVER_V100_PER_EXAMPLE = 1.3, 1.46

#: Figures 2 and 3
HUGE_BATCH_GAP, VIT_COST, RESNET_COST = 11.0, 3.1, 8.0

#: Figure 8, 80 V100s, and the fits of Amdahl's law in Figure A.4
SHARE_OF_IDEAL: Mapping[str, float] = {"private": 0.692, "non-private": 0.533}
PARALLEL: Mapping[str, float] = {"private": 0.995, "non-private": 0.989}
DEVICES = 80

#: Table A1: the methods of each library
SUPPORT: Mapping[str, tuple[str, ...]] = {
    "torch": ("non-private",),
    "jax": ("non-private", "per-example"),
    "opacus": ("per-example",),
    "private-vision": ("ghost", "mixed-ghost"),
    "fastdp": ("bk-ghost", "bk-mixed-ghost", "bk-mix-opt"),
}

#: Table A2: of ViT and of BiT-ResNet
HYPERPARAMETERS: Mapping[str, Mapping[str, float | str]] = {
    "ViT": {"trainable": "all", "epsilon": 8, "delta": 2.04e-5, "lr": 0.0003, "clip_norm": 4.63},
    "BiT-ResNet": {"trainable": "all", "epsilon": 8, "delta": 2.04e-5, "lr": 0.00098, "clip_norm": 6.53},
}

#: Table A3: milliseconds of non-private PyTorch and of Opacus
SECTIONS_MS: Mapping[str, tuple[float, float]] = {
    "forward": (81.14, 101.53),
    "backward": (163.85, 681.48),
    "clip and accumulate": (0.0, 26.76),
    "optimizer step": (38.17, 99.65),
}

#: Table A4: test accuracy after two epochs, by framework, method and precision
ACCURACY: Mapping[tuple[str, str, str], float] = {
    ("torch", "non-private", "fp32"): 0.2285,
    ("torch", "non-private", "tf32"): 0.2301,
    ("jax", "non-private", "fp32"): 0.8273,
    ("torch", "per-example", "fp32"): 0.7096,
    ("torch", "per-example", "tf32"): 0.7094,
    ("jax", "per-example", "fp32"): 0.8009,
    ("torch", "ghost", "fp32"): 0.6978,
    ("torch", "bk-ghost", "fp32"): 0.7341,
}

#: Section 5.3: at the best number of steps
TF32_ACCURACY, TF32_SPEED = 0.879, 2.3

#: ml-privacy-exp, VGG11 on a 1080Ti: seconds of an epoch at batch 100, largest batch, MB
EPOCH_S: Mapping[str, float] = {"non-private": 9.06, "per-example": 71.17, "mixed-ghost": 27.28}
EPOCH_BATCH: Mapping[str, int] = {"non-private": 8625, "per-example": 100, "mixed-ghost": 3500}
MEMORY_MB: Mapping[str, float] = {"non-private": 1425, "per-example": 10261}

#: ml-privacy-exp in JAX: seconds of an epoch of 40.75 s
PROFILE_S: Mapping[str, float] = {"backward": 18.25, "clip and accumulate": 8.75, "noise": 0.48}
PROFILE_TOTAL_S = 40.75


def framework(record: Record) -> str:
    """The framework whose row in the paper a record belongs beside."""
    return "jax" if "jax" in record.engine else "torch"


def table_a4(record: Record) -> float | None:
    """The paper's accuracy of a record's method; vmap counts as per-example."""
    method = "per-example" if record.method == "per-example-vmap" else record.method
    return ACCURACY.get((framework(record), method, str(record.case.get("precision", "fp32"))))
