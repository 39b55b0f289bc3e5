"""Layer, group, instance and RMS norms."""

from __future__ import annotations

import math

import torch.nn.functional as F
from hypothesis import strategies as st

from .convolutions import MEMORY
from .settings import Setting, few, floats, gains, made, moved, shapes, sizes

NORMS = {
    "layer": lambda x, axes, groups, w, b: F.layer_norm(x, x.shape[x.dim() - axes :], w, b),
    "rms": lambda x, axes, groups, w, b: F.rms_norm(x, x.shape[x.dim() - axes :], w, 1e-3),
    "group": lambda x, axes, groups, w, b: F.group_norm(x, groups, w, b),
    "instance": lambda x, axes, groups, w, b: F.instance_norm(x, weight=w, bias=b),
}


@st.composite
def norms(draw) -> Setting:
    kind = draw(st.sampled_from(list(NORMS)))
    by_channel = kind in ("group", "instance")
    axes, groups = draw(few), draw(few)
    if by_channel:  # with three numbers at least to be normalised: two are always 1 and -1
        channels = groups * draw(st.integers(1, 2))
        space = draw(shapes(1, 3) if kind == "instance" else shapes(0, 3))
        while math.prod(space) * (1 if kind == "instance" else channels // groups) < 3:
            space = (*space[:2], draw(st.integers(3, 4)))
        lead, inner, affine = (), (channels, *space), (channels,)
    else:
        lead, inner = draw(shapes(0, 2)), (*draw(shapes(axes - 1, axes - 1)), draw(st.integers(3, 4)))
        affine = inner
    before, after, where = draw(moved(len(lead)))
    weight = draw(st.none() | made(affine))
    bias = None if kind == "rms" else draw(st.none() | made(affine))
    gain = draw(gains((*lead, *inner))) if weight or bias else (*lead, *inner)
    gaps = draw(st.sampled_from(list(MEMORY)))

    def forward(m, x):
        parameters = weight and weight.make(m.weight), bias and bias.make(m.bias)
        return after(NORMS[kind](MEMORY[gaps](before(x)), axes, groups, *parameters))

    text = (
        f"{kind} norm of {inner}, {groups} groups, {weight and weight.form} weight, {bias and bias.form} bias"
    )
    parts = {name: v.leaf for name, v in (("weight", weight), ("bias", bias)) if v}
    batch = {"x": floats(*lead, *inner)}
    return Setting(f"{text}, lead {lead} {where} {gaps}", forward, parts, batch, draw(sizes), gain)
