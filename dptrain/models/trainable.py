"""Which parameters are trained, and therefore clipped, noised and released."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.head import in_head


@dataclass(frozen=True)
class Trainable:
    """Names of the trained parameters, and how many numbers they and all parameters hold."""

    names: tuple[str, ...]
    count: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.count / self.total
        tensors = f"{len(self.names)} tensors"
        return f"{self.count:,} of {self.total:,} parameters ({share:.3g} %) in {tensors}"


def select_trainable(
    model: nn.Module, which: str = "all", frozen: Callable[[str], bool] = lambda name: False
) -> Trainable:
    """Set `requires_grad` on the chosen parameters and clear it on all others.

    which: `all`; `head`; `bias` (every bias, and the head: BitFit); `norm` (the affine parameters
    of normalisation layers, and the head: FiLM); `lora` (what `add_lora` has added, and the head);
    anything else is a regular expression searched for in parameter names. frozen: names that are not
    chosen even so. Raises ModelError if nothing is left.
    """
    everything = dict(model.named_parameters())
    chosen = {name for name in everything if _matches(model, which, name) and not frozen(name)}
    if not chosen:
        raise ModelError(
            f"--trainable {which!r} matches no parameter; names look like {', '.join(list(everything)[:3])}."
        )
    for name, parameter in everything.items():
        parameter.requires_grad_(name in chosen)
    count = sum(everything[name].numel() for name in chosen)
    total = sum(parameter.numel() for parameter in everything.values())
    return Trainable(tuple(name for name in everything if name in chosen), count, total)


def _matches(model: nn.Module, which: str, name: str) -> bool:
    if which == "all":
        return True
    if which in ("head", "bias", "norm", "lora"):
        if in_head(model)(name):
            return True
        owner, _, leaf = name.rpartition(".")
        if which == "lora":
            return "lora_" in owner
        if which == "bias":
            return leaf == "bias" or leaf.endswith("_bias")
        return which == "norm" and "Norm" in type(model.get_submodule(owner)).__name__
    try:
        return re.search(which, name) is not None
    except re.error as error:
        raise ModelError(
            f"--trainable {which!r} is neither all, head, bias, norm, lora nor a regular expression "
            f"({error})."
        ) from error
