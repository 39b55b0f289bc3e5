"""Which layer is the classification head."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dptrain.models.errors import ModelError

USUAL_NAMES = ("head", "classifier", "fc")


def head_name(model: nn.Module) -> str:
    """Dotted name of the classification layer.

    It is what timm says it is, else a submodule with a usual name, else the last linear layer.
    """
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):
        layer = classifier()
        for name, module in model.named_modules():
            if module is layer and list(module.parameters()):
                return name
    for name in USUAL_NAMES:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and list(module.parameters()):
            return name
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no layer that could be its head; name its classification "
            "layer `head`."
        )
    return linear[-1]


def in_head(model: nn.Module) -> Callable[[str], bool]:
    """A function that tells whether a parameter or buffer, by its name, belongs to the head.

    In a model of transformers that is all but the base model: often there are several layers.
    """
    base = getattr(model, "base_model_prefix", "")
    if base and isinstance(getattr(model, base, None), nn.Module):
        return lambda name: not name.startswith(f"{base}.")
    head = head_name(model)
    prefix = f"{head}." if head else ""
    return lambda name: name.startswith(prefix)
