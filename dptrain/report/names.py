"""What models, libraries and methods are called in figures and tables, and in what order they come."""

from __future__ import annotations

import re

# The names of a method in records: its own, and what papers and other libraries call it. A test holds this
# table against that of dptrain.core, which the report must not import.
ALIASES: dict[str, tuple[str, ...]] = {
    "non-private": ("public", "non-private-virtual"),
    "per-example": ("o-flat", "opacus"),
    "per-example-vmap": ("functorch_dp", "private-mini", "dp", "functorch"),
    "per-example-loop": ("scan", "microbatch"),
    "fast-gradient": ("fgc",),
    "ghost": ("pv-ghost", "o-ghost"),
    "mixed-ghost": ("pv-ghost_mixed",),
    "bk-ghost": (),
    "bk-mixed-ghost": ("bk-mixghostclip",),
    "bk-mix-opt": ("bk-mixopt",),
    "auto": (),
}
METHODS = tuple(ALIASES)

LIBRARIES = {
    "torch": "dptrain",
    "jax": "dptrain (JAX)",
    "opacus": "Opacus",
    "private-vision": "private_vision",
    "fastdp": "FastDP",
    "jax-privacy": "JAX-Privacy",
}
OURS = ("torch", "jax")

PAPER_MODELS = {
    "vit-tiny": "ViT-Tiny",
    "vit-small": "ViT-Small",
    "vit-base": "ViT-Base",
    "vit-large": "ViT-Large",
    "vit-huge": "ViT-Huge",
    "bit-50x1": "BiT-50x1",
    "bit-101x1": "BiT-101x1",
    "bit-50x3": "BiT-50x3",
    "bit-101x3": "BiT-101x3",
    "bit-152x4": "BiT-152x4",
}

PRECISIONS = {"fp32": "FP32", "tf32": "TF32", "bf16": "BF16", "fp16": "FP16"}


def method(name: str) -> str:
    """A method's own name for any of its names; one that is not known is left as it is."""
    lower = name.strip().lower()
    return next((own for own, also in ALIASES.items() if lower == own or lower in also), lower)


def engine(name: str) -> str:
    """``opacus`` for opacus-hooks, ``private-vision`` for private_vision, and so on."""
    lower = name.strip().lower().replace("_", "-")
    longest_first = sorted(LIBRARIES, key=len, reverse=True)
    return next((known for known in longest_first if lower.startswith(known)), lower)


def library(name: str) -> str:
    """The library behind an engine, as it writes itself."""
    return LIBRARIES.get(engine(name), name)


def model(name: str) -> str:
    """A model as figures call it, the paper's or any other."""
    return PAPER_MODELS.get(name.lower(), name)


def model_rank(name: str) -> int:
    """The paper's models by family and size, before all others."""
    known = list(PAPER_MODELS)
    return known.index(name.lower()) if name.lower() in known else len(known)


def family(name: str) -> str:
    """ViT, BiT ResNet or other: what the paper gives a panel each."""
    lower = name.lower()
    if lower.startswith("vit"):
        return "ViT"
    return "BiT-ResNet" if lower.startswith(("bit", "resnetv2")) else "Other models"


def depth_and_width(name: str) -> tuple[int, int] | None:
    """(50, 3) for bit-50x3."""
    found = re.search(r"(\d+)x(\d+)", name)
    return (int(found[1]), int(found[2])) if found and family(name) == "BiT-ResNet" else None


def way(engine_name: str, method_name: str) -> str:
    """A library and a method, as a series of a figure is called."""
    own, name = engine(engine_name), method(method_name)
    if name == "non-private":
        framework = "JAX" if "jax" in own else "PyTorch"
        return f"non-private ({framework})"
    return f"{library(engine_name)} {name}"


def precision(name: str) -> str:
    """FP32, TF32, BF16."""
    return PRECISIONS.get(name, name)
