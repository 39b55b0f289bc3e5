"""Embeddings, bags and lookups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from .settings import Setting, flags, integers, made, moved, shapes, sizes

BAGS = {
    "sum": lambda t, i, w, pad: F.embedding_bag(i, t, mode="sum", padding_idx=pad),
    "mean": lambda t, i, w, pad: F.embedding_bag(i, t, mode="mean", padding_idx=pad),
    "max": lambda t, i, w, pad: F.embedding_bag(i, t, mode="max", padding_idx=pad),
    "weighted": lambda t, i, w, pad: F.embedding_bag(
        i, t, mode="sum", per_sample_weights=w[i], padding_idx=pad
    ),
}
#: by name: a function of a table of V rows, indices in [0, V), a vector ``[V]`` and a padding index or None
LOOKUPS = {
    "embedding": lambda t, i, w, pad: F.embedding(i, t, pad),
    "embedding, padding from the end": lambda t, i, w, pad: F.embedding(
        i, t, None if pad is None else pad - len(t)
    ),
    "[ ]": lambda t, i, w, pad: t[i],
    "[ ] from the end": lambda t, i, w, pad: t[i - len(t) * (i % 2)],
    "[ ] of int32": lambda t, i, w, pad: t[i.int()],
    "[ ] in a tuple": lambda t, i, w, pad: t[(i,)] * w[i].reshape(*i.shape, *[1] * (t.dim() - 1)),
    "[ ] twice": lambda t, i, w, pad: t[i] + t[(i + 1) % len(t)],
    "columns": lambda t, i, w, pad: t.movedim(0, -1)[..., i].movedim(
        [*range(-i.dim(), 0)], [*range(i.dim())]
    ),
    "index_select": lambda t, i, w, pad: t.index_select(0, i.flatten()).unflatten(0, i.shape),
    "index_select of the last axis": lambda t, i, w, pad: (
        t.index_select(-1, i.flatten() % t.shape[-1]).movedim(-1, 0).unflatten(0, i.shape)
    ),
    "one-hot": lambda t, i, w, pad: torch.tensordot(F.one_hot(i, len(t)).to(t.dtype), t, 1),
    "columns of a vector": lambda t, i, w, pad: w[i].unsqueeze(-1) * t[i].flatten(i.dim()),
    "each row again": lambda t, i, w, pad: torch.stack(
        [t[i], w[i].reshape(*i.shape, *[1] * (t.dim() - 1)) + t[i]]
    ).sum(0),
}


@st.composite
def tables(draw, name: str) -> Setting:
    bag = name in BAGS
    function = (BAGS if bag else LOOKUPS)[name]
    height = draw(st.integers(3, 5))
    flat = bag or name.startswith("embedding")
    tail = draw(shapes(1, 1) if flat else shapes(1, 2))
    table, weights = draw(made((height, *tail))), draw(made((height,)))
    padding = draw(st.none() | st.integers(0, height - 1))
    lead = draw(shapes(1, 1) if bag else shapes(0, 2))
    leading = bag or name == "index_select of the last axis"  # which has no rule of its own
    before, after, where = ((lambda x: x), (lambda x: x), "") if leading else draw(moved(len(lead)))
    shared = draw(flags)  # the table also has a part in a linear map

    def forward(m, ids):
        t = table.make(m.table)
        y = after(function(t, before(ids), weights.make(m.weights), padding))
        y = y.flatten(1)
        return torch.cat([y, (y @ t.flatten(1).T) if t[0].numel() == y.shape[1] else y], 1) if shared else y

    text = f"{name} of {table.form} table {(height, *tail)}, indices {lead} {where}, padding {padding}"
    parts = {"table": table.leaf, "weights": weights.leaf}
    batch = {"ids": integers(0, height, *lead)}
    return Setting(f"{text}{' shared' if shared else ''}", forward, parts, batch, draw(sizes))
