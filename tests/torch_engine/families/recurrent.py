"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .settings import Setting, few, flags, floats, gains, integers, sizes


@st.composite
def recurrent(draw) -> Setting:
    kind = draw(st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)))
    width, hidden, layers = draw(few), draw(st.integers(2, 3)), draw(st.integers(1, 2))
    both, first, packed = draw(flags), draw(flags), draw(flags)
    options = {"num_layers": layers, "bias": draw(flags), "bidirectional": both, "batch_first": first}
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    length = draw(st.integers(1, 4))
    start = draw(st.sampled_from(("zeros", "data") if packed else ("zeros", "data", "parameters")))
    states = 2 if kind is nn.LSTM else 1
    out = [options.get("proj_size") or hidden, hidden][:states]

    def forward(m, x, lengths):
        places = layers * (1 + both)
        if start == "parameters":
            begin = [m.get_parameter(f"start{i}").expand(-1, len(x), -1).contiguous() for i in range(states)]
        else:
            begin = [torch.cos(x.sum((1, 2)) * (i + 1)).expand(places, n, -1).mT for i, n in enumerate(out)]
            begin = [h.contiguous() for h in begin]
        given = None if start == "zeros" else tuple(begin) if kind is nn.LSTM else begin[0]
        y = x if first else x.transpose(0, 1)
        if packed:
            y = nn.utils.rnn.pack_padded_sequence(y, lengths, first, enforce_sorted=False)
        y, last = m.layer(y, given)
        if packed:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, first, total_length=length)
        y = y if first else y.transpose(0, 1)
        last = last if kind is nn.LSTM else (last,)
        return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in last)], 1)

    parts: dict[str, Any] = {"layer": lambda: kind(width, hidden, **options)}
    if start == "parameters":
        parts |= {f"start{i}": (layers * (1 + both), 1, n) for i, n in enumerate(out)}
    text = f"{kind.__name__}({width}, {hidden}, {options}), {packed=}, {start=}"
    batch = {"x": floats(length, width), "lengths": integers(1, length + 1)}
    return Setting(
        f"{text}, {length} steps", forward, parts, batch, draw(sizes), draw(gains((length, width)))
    )


@st.composite
def cells(draw) -> Setting:
    kind = draw(st.sampled_from((nn.LSTMCell, nn.GRUCell, nn.RNNCell)))
    width, hidden, length, bias = draw(few), draw(few), draw(few), draw(flags)

    def forward(m, x):
        state = None
        for t in range(length):
            state = m.cell(x[:, t], state)
        return torch.cat(state, 1) if kind is nn.LSTMCell else state

    text = f"{kind.__name__}({width}, {hidden}, {bias=}), {length} steps"
    parts = {"cell": lambda: kind(width, hidden, bias=bias)}
    batch = {"x": floats(length, width)}
    return Setting(text, forward, parts, batch, draw(sizes), draw(gains((length, width))))
