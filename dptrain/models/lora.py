"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.forward import Inputs, logits
from dptrain.models.head import in_head

REPEATED = re.compile(r"(^|\.)\d+\.")
"""Blocks are numbered: `blocks.3.attn.qkv`, `bert.encoder.layer.0.output.dense`."""


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    example: Inputs,
    frozen: Callable[[str], bool] = lambda name: False,
) -> None:
    """Add an adapter B A of `rank`, scaled by alpha / rank, to the linear layers of all blocks, in place.

    Those are the layers of attention and MLP, without the head. B starts at zero, so that the
    model's outputs are unchanged. A's initial values come from torch's global generator.

    example: inputs of one example, with which the model is run once: an adapter works only on a
    layer that is called, and some models read a layer's weight without calling it.
    frozen: tells of parameters, by name, whether they stay without an adapter.

    Raises:
        ModelError: peft is not installed, or there is nothing to adapt.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            "--trainable lora needs the package peft; install it with `pip install 'dptrain[lora]'`."
        ) from error
    is_head = in_head(model)
    called = [
        name
        for name in _called_linear_layers(model, example)
        if not is_head(f"{name}.weight") and not frozen(f"{name}.weight")
    ]
    targets = [name for name in called if REPEATED.search(name)] or called
    if not targets:
        raise ModelError(
            f"--trainable lora found no linear layer to adapt in {type(model).__name__}; choose another "
            "--trainable, for example norm."
        )
    # GPT-2 writes its linear layers as Conv1D, with weights the other way round.
    transposed = {not isinstance(model.get_submodule(name), nn.Linear) for name in targets}
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=transposed == {True},
    )
    peft.inject_adapter_in_model(settings, model)


def _called_linear_layers(model: nn.Module, example: Inputs) -> list[str]:
    seen: set[nn.Module] = set()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }
    hooks = [layer.register_forward_hook(lambda module, *_: seen.add(module)) for layer in layers.values()]
    was_training = model.training
    try:
        # With gradients on: without, torch's own encoder layers take a route that calls no layer.
        logits(model.eval(), example)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [name for name, layer in layers.items() if layer in seen]
