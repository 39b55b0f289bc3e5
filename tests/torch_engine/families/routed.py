"""Mixtures of experts: rows that the data send about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .settings import Setting, floats
from .sharing import WIDTH

EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "two layers": lambda: nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH)),
    "norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "twice the same": lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH)] * 2),
    "table": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU(WIDTH)),
}


@st.composite
def routed(draw) -> Setting:
    """Mixtures of experts: which rows an expert sees, and whether any, depends on the batch."""
    experts = draw(st.integers(2, 4))
    top = draw(st.integers(1, experts))
    expert, style = draw(st.sampled_from(list(EXPERTS))), draw(st.sampled_from(list(DISPATCH)))
    length = draw(st.integers(3, 6))

    def forward(m, x):
        h = m.embed(x)
        rows = h.reshape(-1, WIDTH)
        weights, chosen = m.router(rows).softmax(-1).topk(top)
        return h + DISPATCH[style](m.experts, rows, weights, chosen).reshape(h.shape)

    parts = {
        "embed": lambda: nn.Linear(WIDTH, WIDTH),
        "router": lambda: nn.Linear(WIDTH, experts),
        "experts": lambda: nn.ModuleList(EXPERTS[expert]() for _ in range(experts)),
    }
    text = f"{top} of {experts} experts ({expert}) {style}, {length} rows each"
    size = draw(st.sampled_from((3, 19, 2, 20, 5)))  # 19: more examples than a digit spells
    return Setting(text, forward, parts, {"x": floats(length, WIDTH)}, size, overflows=False)


def by_loop(experts, rows, weights, chosen) -> Tensor:
    out = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        row, rank = torch.where(chosen == number)
        out.index_add_(0, row, expert(rows[row]) * weights[row, rank, None])
    return out


def by_loop_over_hits(experts, rows, weights, chosen) -> Tensor:
    out = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        row, rank = torch.where(chosen == number)
        if len(row):
            out = out.index_add(0, row, weights[row, rank].unsqueeze(-1) * expert(rows[row]))
    return out


def by_mask(experts, rows, weights, chosen) -> Tensor:
    out = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        mine = (chosen == number).any(-1)
        weight = (weights * (chosen == number)).sum(-1, keepdim=True)
        if mine.any():
            out[mine] += weight[mine] * expert(rows[mine])
    return out


def by_sorting(experts, rows, weights, chosen) -> Tensor:
    order = chosen.flatten().argsort()
    rows = rows.repeat_interleave(chosen.shape[1], 0)[order]
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    done = torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts))])
    back = torch.empty_like(done).index_copy(0, order, done)
    return (back.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1)


DISPATCH = {f.__name__.replace("_", " "): f for f in (by_loop, by_loop_over_hits, by_mask, by_sorting)}
