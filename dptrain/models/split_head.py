"""A model cut before its head, so that a frozen backbone is run once per example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.forward import Inputs, logits
from dptrain.models.head import head_name

Backbone = Callable[[Inputs], torch.Tensor]


def split_head(model: nn.Module) -> tuple[Backbone, nn.Module]:
    """(backbone, head) with model(x) == head(backbone(x)) in evaluation mode.

    The layer in the head is the model's own layer: training it trains the model. The backbone
    puts the model into evaluation mode, so that its features do not depend on chance.
    """
    name = head_name(model)
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ModelError(
            f"Features can be cached before a linear head, but {name} is a {type(layer).__name__}."
        )
    # BiT-ResNets write the head as a 1 x 1 convolution and flatten its output.
    head = nn.Sequential(layer, nn.Flatten()) if isinstance(layer, nn.Conv2d) else layer

    def backbone(inputs: Inputs) -> torch.Tensor:
        model.eval()
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            logits(model, inputs)
        finally:
            hook.remove()
        if len(seen) != 1:
            raise ModelError(
                f"The head {name} ran {len(seen)} times in one pass; features can be cached only "
                "if it runs once."
            )
        return seen[0]

    return backbone, head
