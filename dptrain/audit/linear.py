"""A model whose gradients are what the data say: linear layers side by side, losses linear in their outputs.

The loss of an example is ``Σ_l <y_l, W_l x>``. Its gradient with respect to layer l is the outer product of
y_l and x, whatever the weights are, so that data can be made for any gradients of rank one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Float32 = npt.NDArray[np.float32]

LAYERS = 4
NAMES = tuple(f"layer{k}.weight" for k in range(LAYERS))
#: layers from this one on may be used several times, each time with a part of the input
FIRST_REPEATED = 2


class SideBySide(nn.Module):
    """``[B, columns] -> [B, LAYERS, rows]``; weights begin at zero."""

    def __init__(self, columns: int, rows: int, repeats: int):
        super().__init__()
        self.repeats = repeats
        for name in NAMES:
            layer = nn.Linear(columns, rows, bias=False)
            nn.init.zeros_(layer.weight)
            self.add_module(name.partition(".")[0], layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self._output(k, layer, x) for k, layer in enumerate(self.children())], 1)

    def _output(self, k: int, layer: nn.Module, x: Tensor) -> Tensor:
        return summed(layer, x, _uses(k, self.repeats))


def summed(layer: Any, x: Any, uses: int) -> Any:
    """The layer's output, by so many uses of its weight."""
    return layer(x) if uses == 1 else sum(layer(x / uses) for _ in range(uses))


def _uses(k: int, repeats: int) -> int:
    return repeats if k >= FIRST_REPEATED else 1


class LinearProblem:
    """Model and loss; whoever inherits has ``rows``, ``columns``, ``repeats`` and the data."""

    rows: int
    columns: int
    repeats: int

    def torch_model(self) -> nn.Module:
        return SideBySide(self.columns, self.rows, self.repeats)

    @staticmethod
    def torch_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) * y).sum((1, 2))

    def jax_params(self) -> dict[str, Float32]:
        return {name: np.zeros((self.rows, self.columns), np.float32) for name in NAMES}

    def jax_loss(self, params: Mapping[str, Any], example: Any) -> Any:
        x, y = example
        outputs = (summed(params[name].__matmul__, x, _uses(k, self.repeats)) for k, name in enumerate(NAMES))
        return sum((output * y[k]).sum() for k, output in enumerate(outputs))
