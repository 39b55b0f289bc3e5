"""A model cut in two, so that its frozen first part is run once per example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.forward import Inputs, logits
from dptrain.models.head import head_name

Backbone = Callable[[Inputs], torch.Tensor]

STACKS = ("blocks", "stages")
"""What timm calls a model's sequence of blocks, or of stages of blocks."""


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
    return _before(model, name), head


def split_blocks(model: nn.Module, count: int, example: torch.Tensor) -> tuple[Backbone, nn.Module]:
    """(backbone, rest) with model(x) == rest(backbone(x)) in evaluation mode, cut behind `count` blocks.

    The rest's parameters are the model's own: training them trains the model.

    example: an input [1, ...], whose values are not looked at.

    Raises:
        ModelError: the model has no such blocks, or they are not all that leads to the rest.
    """
    name = stack_name(model, count)
    backbone, rest = _before(model, f"{name}.{count}"), _Rest(model, name, count)
    inputs = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    if not rest.fits(inputs, backbone(inputs)):
        raise ModelError(
            f"{type(model).__name__} cannot be cut behind its first blocks, for what follows reads more than "
            "their output: leave out --cache-features."
        )
    return backbone, rest


def in_first_blocks(model: nn.Module, count: int) -> Callable[[str], bool]:
    """A function that tells whether a parameter or buffer, by its name, is in the first `count` blocks or
    before them."""
    name = stack_name(model, count)
    first = tuple(f"{name}.{index}." for index in range(count))
    later = tuple(f"{child}." for child in [name, *_after(model, name)])
    return lambda key: key.startswith(first) or not key.startswith(later)


def stack_name(model: nn.Module, count: int) -> str:
    """The name of the sequence of which the first `count` blocks are to be frozen.

    Raises ModelError if there is none, or nothing would be left of it.
    """
    for name in STACKS:
        stack = getattr(model, name, None)
        if not isinstance(stack, nn.Sequential | nn.ModuleList):
            continue
        if count < len(stack):
            return name
        raise ModelError(
            f"--frozen-blocks is {count}, but {type(model).__name__} has {len(stack)} {name}: to train none "
            "of them, use --trainable head."
        )
    raise ModelError(
        f"--frozen-blocks needs a model with a sequence of blocks, as timm's have: {type(model).__name__} "
        f"has none of {', '.join(STACKS)}."
    )


def _after(model: nn.Module, stack: str) -> list[str]:
    """The names of the model's parts that come after its blocks."""
    names = [name for name, _ in model.named_children()]
    return names[names.index(stack) + 1 :]


class _Rest(nn.Module):
    """What of a timm model follows the first `count` blocks: their output -> logits."""

    def __init__(self, model: nn.Module, stack: str, count: int) -> None:
        super().__init__()
        self.model, self._stack, self._count = model, stack, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.before_head(x))

    @torch.no_grad()
    def fits(self, inputs: torch.Tensor, features: torch.Tensor) -> bool:
        """Whether the model, in evaluation mode, makes of `inputs` what this makes of `features`.

        A head is zero at first, and would hide any difference."""
        model = self.model
        if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
            return False
        try:
            same = torch.equal(self.before_head(features), model.forward_features(inputs))
            return same and torch.equal(self(features), logits(model, inputs))
        except (TypeError, RuntimeError):  # a block takes more arguments, or others
            return False

    def before_head(self, x: torch.Tensor) -> torch.Tensor:
        """What the head reads."""
        for block in list(self.model.get_submodule(self._stack))[self._count :]:
            x = block(x)
        for name in _after(self.model, self._stack):
            if name in ("norm", "norm_pre"):  # what timm has before the head
                x = self.model.get_submodule(name)(x)
        return x


def _before(model: nn.Module, name: str) -> Backbone:
    """What goes into the submodule `name` of the model, in evaluation mode."""
    layer = model.get_submodule(name)

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
                f"{name} ran {len(seen)} times in one pass; features can be cached only before what runs "
                "once."
            )
        return seen[0]

    return backbone
