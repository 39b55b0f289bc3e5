"""One way to call every model."""

from __future__ import annotations

import torch
from torch import nn

Inputs = torch.Tensor | dict[str, torch.Tensor]


def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Logits [B, num_classes] for a tensor, or for tensors by the names of the model's arguments.

    Models of transformers return an object that holds them.
    """
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
