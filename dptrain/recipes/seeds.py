"""Every way of training that the two measurement projects have, by the name that it has there."""

from __future__ import annotations

from dataclasses import replace

from dptrain.bench import Case
from dptrain.recipes.paper import CONVNET, TINY, of

PAPER = {
    "O-flat": "opacus",
    "O-ghost": "opacus",
    "PV-ghost": "private-vision",
    "PV-ghost_mixed": "private-vision",
    "BK-ghost": "fastdp",
    "BK-MixGhostClip": "fastdp",
    "BK-MixOpt": "fastdp",
}
#: as the paper's JAX scripts call them: those that compile for every batch size, and the masked one
NAIVE, MASKED = ("non-private-virtual", "private-mini"), "DP"


def seed_methods() -> dict[str, Case]:
    """A tiny case for each name; that of a flag, such as tf32, is a case that sets it."""
    cases = {"non-private": replace(TINY, method="non-private")}
    cases |= {name: of(TINY, (engine, name))[0] for name, engine in PAPER.items()}
    cases |= {name: replace(TINY, engine="jax", method=name, measure="compile") for name in NAIVE}
    cases |= {
        MASKED: replace(TINY, engine="jax", method=MASKED),
        "tf32": of(TINY, ("opacus", "O-flat"), precision="tf32")[0],
        "torch2": replace(CONVNET, method="auto", compile=True),
        "distributed": of(TINY, ("opacus", "O-flat"), measure="scaling", devices=2)[0],
        "public": replace(CONVNET, method="public"),
        "opacus": of(CONVNET, ("opacus", "opacus"))[0],
        "functorch_dp": of(CONVNET, ("opacus", "functorch_dp"))[0],
        "mixed_ghost": replace(CONVNET, method="mixed-ghost"),
    }
    return cases


def seed_cases() -> list[Case]:
    """The cases of `seed_methods`."""
    return list(seed_methods().values())
