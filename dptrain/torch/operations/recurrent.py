"""Recurrent layers: LSTM, GRU and plain, padded or packed, and their cells.

PyTorch runs a layer as one operation, which hides how often it uses its weights. Here the loop over
time is written out. What a step takes from its input is one linear map for the whole sequence. What
it takes from the state before it cannot be: there the weight enters as a constant, and a *tap*, zeros
added to the result, catches the gradient of all steps at once, to be paired with the states when
they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import Capture
from ..functions import TapFunction
from ..uses.broadcast import Broadcast
from ..uses.linear import Linear
from .values import lowered, spread


@dataclass
class Tap:
    """A linear map inside the loop, ``y_t = h_t W^T + b``, whose uses are recorded once for all steps."""

    weight: Tensor
    bias: Tensor | None
    #: zeros for each step
    zeros: Sequence[Tensor]
    operands: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, step: int) -> Tensor:
        self.operands.append(h.detach())
        return F.linear(h, self.weight, self.bias) + self.zeros[step]


def _tap(capture: Capture, weight: Tensor, bias: Tensor | None, like: Tensor, sizes, backwards, name) -> Tap:
    """``sizes``: rows of each step, in the order of the sequence; ``backwards``: run from its end."""
    weight_use = bias_use = None
    if capture.is_parameter(weight):
        weight_use = capture.use(Linear(False), weight, name + " state")
    if bias is not None and capture.is_parameter(bias):
        bias_use = capture.use(Broadcast((1, *bias.shape)), bias, name + " state bias")
    inside = [None if p is None else p.detach().to(like.dtype) for p in (weight, bias)]
    operands: list[Tensor] = []

    def operand() -> Tensor:
        return torch.cat(operands[::-1] if backwards else operands)

    shape = (sum(sizes), weight.shape[0])
    zeros = TapFunction.apply(capture.anchor, shape, like.dtype, weight_use, bias_use, operand)
    return Tap(inside[0], inside[1], zeros.split(list(sizes)), operands)


# ------------------------------------------------------------------ what one step does


State = tuple[Tensor, ...]


def _lstm_step(x: Tensor, state: State, tap: Tap, project: Tap | None, t: int) -> State:
    h, c = state
    i, f, g, o = (x + tap(h, t)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if project is None else project(h, t)), c


def _gru_step(x: Tensor, state: State, tap: Tap, project: Tap | None, t: int) -> State:
    (h,) = state
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = tap(h, t).chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + z * (h - n),)


def _plain_step(activation: Callable[[Tensor], Tensor]):
    def step(x: Tensor, state: State, tap: Tap, project: Tap | None, t: int) -> State:
        return (activation(x + tap(state[0], t)),)

    return step


STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}


# ------------------------------------------------------------------ layers


def layer(capture: Capture, func, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``torch.lstm`` and its kin: ``(output, h_n)``, and ``c_n`` for an LSTM."""
    name = func.__name__
    packed = isinstance(rest[1], (tuple, list, Tensor)) and isinstance(rest[2], (list, tuple))
    if packed:
        sizes, hx, params, biases, layers, dropout, training, both = rest
        sizes, data, batch_first = sizes.tolist(), input, False
    else:
        hx, params, biases, layers, dropout, training, both, batch_first = rest
        data = input.transpose(0, 1) if batch_first else input
        sizes = [data.shape[1]] * data.shape[0]
        data = data.flatten(0, 1)
    states = [_as_data(capture, h, name) for h in (hx if isinstance(hx, (tuple, list)) else (hx,))]
    data = _as_data(capture, data, name)
    directions = 2 if both else 1
    each = len(params) // (layers * directions)
    last: list[State] = []
    for depth in range(layers):
        outs = []
        for direction in range(directions):
            place = depth * directions + direction
            weights = params[place * each : (place + 1) * each]
            start = tuple(s[place] for s in states)
            out, end = _run(capture, name, data, sizes, start, weights, biases, direction == 1)
            outs.append(out)
            last.append(end)
        data = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        if dropout and training and depth < layers - 1:
            data = F.dropout(data, dropout, True)
        data = capture.mark_data(data)
    if not packed:
        data = data.unflatten(0, (len(sizes), sizes[0]))
        data = data.transpose(0, 1) if batch_first else data
    return data, *(torch.stack(s) for s in zip(*last))


def _run(
    capture: Capture,
    name: str,
    data: Tensor,
    sizes: list[int],
    start: State,
    weights: Sequence[Tensor],
    biases: bool,
    backwards: bool,
) -> tuple[Tensor, State]:
    """One direction of one layer over ``data [sum(sizes), F]``, of which ``sizes[t]`` rows are step t."""
    b_ih, b_hh = (weights[2], weights[3]) if biases else (None, None)
    w_hr = weights[-1] if len(weights) in (3, 5) else None
    x = capture(F.linear, data, weights[0], b_ih)
    tap = _tap(capture, weights[1], b_hh, x, sizes, backwards, name)
    project = None if w_hr is None else _tap(capture, w_hr, None, x, sizes, backwards, name + " projection")
    steps = x.split(sizes)
    outs: list[Tensor] = [x] * len(sizes)
    state = tuple(s[: sizes[-1] if backwards else sizes[0]].to(x.dtype) for s in start)
    ended: list[State] = []
    for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        rows = len(state[0])
        if rows > sizes[t]:  # sequences that end before step t; longer ones come first
            ended.append(tuple(s[sizes[t] :] for s in state))
            state = tuple(s[: sizes[t]] for s in state)
        elif rows < sizes[t]:  # backwards: those that end at step t begin here
            state = tuple(torch.cat([s, s0[rows : sizes[t]].to(s.dtype)]) for s, s0 in zip(state, start))
        state = STEPS[name](steps[t], state, tap, project, t)
        outs[t] = state[0]
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended)))
    return torch.cat(outs), state


def _as_data(capture: Capture, value: Tensor, name: str) -> Tensor:
    """What goes into a layer is treated as data, for zeros meet data in it."""
    if capture.is_parameter(value):
        value = spread(capture, value, value.shape, name)
    return capture.mark_data(lowered(value.view_as(value)))


# ------------------------------------------------------------------ cells


def cell(capture: Capture, func, input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """``torch.lstm_cell`` and its kin: one step."""
    name = func.__name__.removesuffix("_cell")
    state = tuple(_as_data(capture, h, name) for h in (hx if isinstance(hx, (tuple, list)) else (hx,)))
    x = capture(F.linear, _as_data(capture, input, name), w_ih, b_ih)

    def tap(h: Tensor, step: int) -> Tensor:
        return capture(F.linear, h, w_hh, b_hh)

    out = STEPS[name](x, state, tap, None, 0)
    return out if name == "lstm" else out[0]
