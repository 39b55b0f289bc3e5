"""Linear layers, products and einsums."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from .settings import Setting, flags, floats, gains, made, moved, shapes, sizes


@st.composite
def linears(draw, kind: str) -> Setting:
    """One matrix, in the ways in which PyTorch lets it be applied."""
    lead, k, n = draw(shapes(0, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    # what has no rule of its own takes examples on an axis of their own, or leading
    before, after, where = draw(moved(len(lead), fold=False if kind in ("tensordot", "inner") else None))
    flip, width, map_ = MAPS[kind]
    weight = draw(made((n, k) if flip else (k, n)))
    bias = draw(made((n,) if width else ()))
    forward = lambda m, x: after(map_(before(x), weight.make(m.weight), bias.make(m.bias)))  # noqa: E731
    parts = {"weight": weight.leaf, "bias": bias.leaf}
    text = f"{kind} {k}->{n}, {weight.form} weight, {bias.form} bias, on {(*lead, k)} {where}"
    return Setting(text, forward, parts, {"x": floats(*lead, k)}, draw(sizes), draw(gains((*lead, k))))


def rows_of(x: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
    """A map of matrices applied to all leading axes."""
    return map_(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


def batches_of(x: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
    """A map of batches of matrices, with the last leading axis for their rows."""
    y = map_(x.reshape(-1, x.shape[-2], x.shape[-1]) if x.dim() > 2 else x.unsqueeze(1))
    return y.reshape(*x.shape[:-1], y.shape[-1])


#: by name: whether the matrix is ``[N, K]``, whether the bias has an axis, and the map
MAPS: dict[str, tuple[bool, bool, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "linear": (True, True, lambda x, w, b: F.linear(x, w, b)),
    "linear without bias": (True, True, lambda x, w, b: F.linear(x, w) * b),
    "matmul": (False, True, lambda x, w, b: x @ w + b),
    "matmul from the left": (True, True, lambda x, w, b: (w @ x.unsqueeze(-1)).squeeze(-1) + b),
    "mm": (False, True, lambda x, w, b: rows_of(x, lambda r: torch.mm(r, w)) + b),
    "mm from the left": (True, True, lambda x, w, b: rows_of(x, lambda r: torch.mm(w, r.T).T) + b),
    "addmm": (False, True, lambda x, w, b: rows_of(x, lambda r: torch.addmm(b, r, w))),
    "addmm of a number": (False, False, lambda x, w, b: rows_of(x, lambda r: torch.addmm(b, r, w))),
    "addmm with factors": (
        False, True, lambda x, w, b: rows_of(x, lambda r: torch.addmm(b, r, w, beta=0.5, alpha=2)),
    ),
    "addmm without bias": (
        False, True, lambda x, w, b: rows_of(x, lambda r: torch.addmm(b, r, w, beta=0)) + b,
    ),
    "addmm of data": (
        False, True, lambda x, w, b: rows_of(x, lambda r: torch.addmm(r.sum(1, True), r, w, alpha=3)) + b,
    ),
    "bmm": (
        False, True, lambda x, w, b: batches_of(x, lambda r: torch.bmm(r, w.expand(len(r), *w.shape))) + b,
    ),
    "baddbmm": (
        False, True,
        lambda x, w, b: batches_of(
            x, lambda r: torch.baddbmm(b, r, w.expand(len(r), *w.shape), beta=0.5, alpha=2)
        ),
    ),
    "tensordot": (False, True, lambda x, w, b: torch.tensordot(x, w, ([-1], [0])) + b),
    "inner": (True, True, lambda x, w, b: torch.inner(x, w) + b),
    "vectors": (
        False, True, lambda x, w, b: torch.stack([x @ column for column in w.unbind(1)], -1) + b,
    ),
    "convolution of width one": (
        True, True,
        lambda x, w, b: rows_of(x, lambda r: F.conv1d(r.unsqueeze(-1), w.unsqueeze(-1), b).squeeze(-1)),
    ),
}  # fmt: skip


@st.composite
def products(draw) -> Setting:
    """``matmul`` from either side, with axes that one operand has and the other lacks."""
    left = draw(flags)
    k, new = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    axes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.sampled_from(("both", "data", "value"))), max_size=3)
    )
    data = [1 if who == "value" else n for n, who in axes]
    value = [1 if who == "data" else n for n, who in axes]
    place = draw(st.integers(-1, len(axes)))  # of the examples among these axes; -1: they are the rows
    if place >= 0:
        value.insert(place, 1)
    while data and data[0] == 1 and place != 0 and draw(flags):
        data.pop(0)
        place -= place > 0
    while value and value[0] == 1 and draw(flags):
        value.pop(0)
    vector = all(n == 1 for n in value) and draw(flags)
    weight = draw(made((k,) if vector else (*value, new, k) if left else (*value, k, new)))
    multiply = draw(st.sampled_from((torch.matmul, operator.matmul, Tensor.matmul)))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=1)) if place >= 0 else []
    shape = (*data, k, *rows) if left else (*data, *rows, k)
    # counted from the end, where operand and result differ by an axis at most
    if place >= 0:
        there, back = place - len(data) - 3, place - len(data) - 3 + vector
    else:
        there, back = (-1, -1) if left else (-2, -2 + vector)

    def forward(m, x):
        x, w = x.movedim(0, there), weight.make(m.weight)
        return (multiply(w, x) if left else multiply(x, w)).movedim(back, 0)

    operands = f"{'vector' if vector else value} {weight.form}", f"{shape} with examples on axis {there}"
    text = f"{multiply.__name__} of {' and '.join(operands if left else operands[::-1])}, {k} to {new}"
    return Setting(
        text, forward, {"weight": weight.leaf}, {"x": floats(*shape)}, draw(sizes), draw(gains(shape))
    )


@st.composite
def einsums(draw) -> Setting:
    """Random equations of data and one value, or two, in any order of operands and of labels."""
    size = {label: draw(st.integers(1, 4)) for label in "tudef"}
    some = lambda labels, least=0: draw(  # noqa: E731
        st.lists(st.sampled_from(labels), min_size=least, max_size=3, unique=True).map("".join)
    )
    terms = [some("tude")] + [some("tudef", 1) for _ in range(draw(st.sampled_from((1, 1, 1, 2))))]
    out = "".join(draw(st.permutations(some("".join(sorted(set("".join(terms))))) + "b")))
    values = [draw(made(tuple(size[i] for i in term))) for term in terms[1:]]
    shape = tuple(size[i] for i in terms[0])
    place = draw(st.integers(0, len(shape)))
    terms[0] = terms[0][:place] + "b" + terms[0][place:]
    if terms[0][0] == "b" and draw(flags):  # the leading axes of the data as an ellipsis
        width = draw(st.integers(1, len(terms[0])))
        head = terms[0][:width]
        if head in out and not any(i in term for i in head for term in terms[1:]):
            terms[0], out = terms[0].replace(head, "...", 1), out.replace(head, "...", 1)
    order = draw(st.permutations(range(len(terms))))
    spaces = draw(st.sampled_from(("", " ")))
    equation = f",{spaces}".join(terms[i] for i in order) + f"{spaces}->{spaces}{out}"
    back = out.replace(
        "...", "".join("b" if i == 0 else "." for i in range(1 + len(shape) - len(terms[0]) + 3))
    )
    as_list = draw(flags)

    def forward(m, x):
        operands = [x.movedim(0, place), *(v.make(getattr(m, f"v{i}")) for i, v in enumerate(values))]
        operands = [operands[i] for i in order]
        y = torch.einsum(equation, operands) if as_list else torch.einsum(equation, *operands)
        return y.movedim(back.index("b"), 0)

    text = f"{equation!r} of data {terms[0]} {shape} and {' and '.join(v.form for v in values)} values"
    parts = {f"v{i}": v.leaf for i, v in enumerate(values)}
    return Setting(text, forward, parts, {"x": floats(*shape)}, draw(sizes), draw(gains(shape)))
