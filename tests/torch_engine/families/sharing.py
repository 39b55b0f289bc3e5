"""Parameters that are used more than once, and values that are made of others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from .settings import Setting, few, flags, floats, gains, integers, sizes

WIDTH = 3
#: values made of three square leaves, of which the second and the third may be the first again
VALUES = {
    "a": lambda a, b, c: a,
    "a^T": lambda a, b, c: a.T,
    "flipped": lambda a, b, c: a.flip(0, 1),
    "rolled": lambda a, b, c: a.roll(1, 0),
    "rows of two": lambda a, b, c: torch.cat([a[:1], b[1:]]),
    "rows again": lambda a, b, c: torch.cat([a[1:], a[1:2]]),
    "columns of two": lambda a, b, c: torch.cat([b[:, 2:], a[:, :2]], 1),
    "of a stack": lambda a, b, c: torch.stack([b, a.T])[1],
    "permuted": lambda a, b, c: a[[2, 0, 1]],
    "viewed otherwise": lambda a, b, c: a.T.reshape(-1).view(WIDTH, WIDTH),
    "a + cb": lambda a, b, c: a + 0.5 * c[:, :2] @ b[:2],
    "ab": lambda a, b, c: a @ b,
    "a * b": lambda a, b, c: a * b,
    "symmetric": lambda a, b, c: a + a.T,
    "triangular": lambda a, b, c: a.tril() + b.triu(1),
    "standardised": lambda a, b, c: (a - a.mean(1, keepdim=True)) / (a.var(1, keepdim=True) + 0.1).sqrt(),
    "normalised": lambda a, b, c: F.normalize(a, dim=1) * b[:, :1],
    "halved": lambda a, b, c: a / 2,
    "one row": lambda a, b, c: a[:1].expand(WIDTH, -1),
    "outer": lambda a, b, c: torch.outer(a[0], b[:, 1]),
}
#: what a value does to a state ``[B, T, WIDTH]``, given indices ``[B, T]``
USES = {
    "linear": lambda h, v, i: F.linear(h, v),
    "matmul": lambda h, v, i: h @ v,
    "from the left": lambda h, v, i: (v @ h.mT).mT,
    "einsum": lambda h, v, i: torch.einsum("ij,bti->btj", v, h),
    "lookup": lambda h, v, i: h + v[i],
    "embedding": lambda h, v, i: h * F.embedding(i, v),
    "bias": lambda h, v, i: h + v[1],
    "scale": lambda h, v, i: v[:, 0] * h,
    "slices": lambda h, v, i: F.linear(h[..., :2], v[:, :2]) + F.linear(h[..., 1:], v[:, 1:]),
    "rows": lambda h, v, i: torch.cat([F.linear(h, v[:1]), h @ v[:, 1:]], -1),
    "convolution": lambda h, v, i: F.conv1d(h.mT, v.unsqueeze(-1), v[0]).mT,
    "kernel": lambda h, v, i: F.conv1d(h.mT, v.unsqueeze(1), padding="same", groups=WIDTH).mT,
    "norm": lambda h, v, i: F.layer_norm(h, (WIDTH,), v[0], v[1]),
    "number": lambda h, v, i: h * v[0, 0] + v.sum(),
    "cdist": lambda h, v, i: torch.cdist(h, v),
}


@st.composite
def shared(draw, uses, values) -> Setting:
    """Chains and sums of uses of one to three leaves: tied, transposed, overlapping, composed."""
    leaves = draw(few)
    pick = st.integers(0, leaves - 1)
    steps = [
        (
            draw(st.sampled_from(list(uses))),
            draw(st.sampled_from(list(values))),
            draw(st.tuples(pick, pick, pick)),
        )
        for _ in range(draw(st.integers(2, 5)))
    ]
    skips = [draw(flags) for _ in steps]
    length = draw(few)

    def forward(m, x, ids):
        w = [m.get_parameter(f"w{i}") for i in range(leaves)]
        h = x
        for (use, value, which), skip in zip(steps, skips):
            y = torch.tanh(USES[use](h, VALUES[value](*(w[i] for i in which)), ids))
            h = h + y if skip else y
        return h

    text = " ; ".join(f"{use} by {value}{which}" for use, value, which in steps)
    batch = {"x": floats(length, WIDTH), "ids": integers(0, WIDTH, length)}
    parts = {f"w{i}": (WIDTH, WIDTH) for i in range(leaves)}
    return Setting(text, forward, parts, batch, draw(sizes), draw(gains((length, WIDTH))))
