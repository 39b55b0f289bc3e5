"""Convolutions of all dimensions, strides, groups and memory layouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from .settings import Setting, few, flags, floats, gains, made, moved, shapes, sizes

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MEMORY = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(
        memory_format=CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    ),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@st.composite
def convolutions(draw) -> Setting:
    n = draw(few)
    transposed = draw(flags)
    groups = draw(st.sampled_from((1, 2, 1, 3)))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    kernel, dilation = each(1, 3 if n < 3 else 2), each(1, 2)
    mode = "constant" if transposed else draw(st.sampled_from(("constant",) * 3 + ("reflect", "circular")))
    padding: Any = each(0, 2 if mode == "constant" else 1)
    stride = each(1, 3)
    if not transposed and mode == "constant":
        padding = draw(st.sampled_from((padding, "same", padding, "valid", "same")))
    if padding == "same":
        stride = (1,) * n
    around = padding if isinstance(padding, tuple) else (0,) * n
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    if transposed:  # as many positions as make an output of one at least
        least = [1 + max(0, -((w - 2 * p - 1) // s)) for w, p, s in zip(span, around, stride)]
    else:
        least = [max(w - 2 * p, p + 1) for w, p in zip(span, around)]
    space = tuple(size + draw(st.integers(0, 3 if n < 3 else 1)) for size in least)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        spare = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        options["output_padding"] = spare
    if draw(flags):  # as one number where one number will do
        alike = {k: v[0] for k, v in options.items() if isinstance(v, tuple) and len(set(v)) == 1}
        options |= alike
    weight = draw(
        made((inside, outside // groups, *kernel) if transposed else (outside, inside // groups, *kernel))
    )
    bias = draw(st.none() | made((outside,)))
    lead = draw(shapes(0, 1))  # frames or windows
    before, after, where = draw(moved(len(lead), fold=True))
    memory = draw(st.sampled_from(list(MEMORY)))
    operation = getattr(F, f"conv{'_transpose' if transposed else ''}{n}d")

    def forward(m, x):
        y, how = MEMORY[memory](before(x)), dict(options)
        if mode != "constant":
            y, how["padding"] = F.pad(y, [p for p in reversed(around) for _ in "lr"], mode), 0
        return after(operation(y, weight.make(m.weight), bias and bias.make(m.bias), **how))

    shape = (*lead, inside, *space)
    text = (
        f"{operation.__name__} {inside}->{outside} kernel {kernel} {options} {mode}, {weight.form} weight, "
        f"{bias and bias.form} bias, on {shape} {memory} {where}"
    )
    parts = {"weight": weight.leaf} | ({"bias": bias.leaf} if bias else {})
    return Setting(text, forward, parts, {"x": floats(*shape)}, draw(sizes), draw(gains(shape)))
