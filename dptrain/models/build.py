"""A model by name."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

import timm
import torch
from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.forward import Inputs, logits
from dptrain.models.names import PAPER_MODELS, timm_name
from dptrain.models.small import SMALL
from dptrain.models.transformers_classifier import Text, build_huggingface, is_huggingface
from dptrain.models.weights import WeightReport, load_weights

InputShape = tuple[int, ...]
SAFE_FILE = "model.safetensors"
"""Asked for by this name, no other format is fetched in its place: others are pickles, which can run code."""


def build(
    name: str,
    num_classes: int,
    input_shape: InputShape,
    pretrained: bool = False,
    weights: Path | str | None = None,
    text: Text | None = None,
) -> nn.Module:
    """A float32 model that maps inputs [B, *input_shape] to logits [B, num_classes].

    name: a small network (`SMALL`), a model of the paper (`PAPER_MODELS`), any timm name,
    `hf:NAME_OR_PATH` (transformers), or `package.module:factory`, called as
    factory(num_classes, input_shape).
    pretrained: load the weights of that name from the hub; weights: load a safetensors file. Either
    way a head of another size is replaced by a fresh one. Raises ModelError.
    text: what the model is to read if not a tensor.
    """
    return build_with_report(name, num_classes, input_shape, pretrained, weights, text)[0]


def build_with_report(
    name: str,
    num_classes: int,
    input_shape: InputShape,
    pretrained: bool = False,
    weights: Path | str | None = None,
    text: Text | None = None,
) -> tuple[nn.Module, WeightReport | None]:
    """`build`, and what became of each tensor when weights were loaded and it is known."""
    if pretrained and weights is not None:
        raise ModelError("Give either --pretrained or --weights, not both.")
    report = None
    if is_huggingface(name):
        model, report = build_huggingface(name, num_classes, input_shape, pretrained, text)
    elif name in SMALL or ":" in name:
        if pretrained:
            raise ModelError(
                f"{name} has no published weights; drop --pretrained, or load a file with --weights."
            )
        model = (
            SMALL[name](num_classes, input_shape)
            if name in SMALL
            else _imported(name, num_classes, input_shape)
        )
    else:
        model = _from_timm(name, num_classes, input_shape, pretrained)
    example = torch.zeros(1, *input_shape) if text is None else text.example
    _check_output(name, model, num_classes, example)
    return model, report if weights is None else load_weights(model, weights)


def _from_timm(name: str, num_classes: int, input_shape: InputShape, pretrained: bool) -> nn.Module:
    resolved = timm_name(name)
    if not timm.is_model(resolved):
        known = [*SMALL, *PAPER_MODELS, *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"small networks are {', '.join(SMALL)}."
        raise ModelError(f"There is no model {name!r}; {hint}")
    if len(input_shape) != 3:
        raise ModelError(f"{name} reads images [C, H, W], but one input has shape {list(input_shape)}.")
    channels, height, width = input_shape
    config = timm.get_pretrained_cfg(resolved)
    arguments: dict[str, object] = {"num_classes": num_classes, "in_chans": channels}
    if config is not None and config.fixed_input_size:
        # Position tables have a fixed length; timm resamples a stored one to this size.
        arguments["img_size"] = (height, width)
    if pretrained:
        if config is None or not config.hf_hub_id:
            raise ModelError(
                f"{resolved} has no published weights in safetensors, and other formats can run code; give a "
                "file with --weights."
            )
        arguments["pretrained_cfg_overlay"] = {"hf_hub_filename": SAFE_FILE, "custom_load": False}
    try:
        model = timm.create_model(resolved, pretrained=pretrained, **arguments)
    except (RuntimeError, AssertionError, TypeError, ValueError, OSError) as error:
        reason = (
            str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        )
        raise ModelError(
            f"{resolved} cannot be built for inputs {list(input_shape)}: {reason}; "
            "try another --image-size, or --weights FILE where the hub is out of reach."
        ) from error
    if pretrained:
        for parameter in model.get_classifier().parameters():
            nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def _check_output(name: str, model: nn.Module, num_classes: int, example: Inputs) -> None:
    """Refuse a model that cannot read such inputs, before anything is spent on it."""
    was_training = model.training
    try:
        shape = list(logits(model.eval(), example).shape)
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if isinstance(example, dict):
            raise ModelError(
                f"{name} cannot read tokenised text ({', '.join(example)}): {reason}; try a smaller "
                "--max-length, or a --model that reads text."
            ) from error
        raise ModelError(
            f"{name} cannot read inputs {list(example.shape[1:])}: {reason}; try another --image-size."
        ) from error
    finally:
        model.train(was_training)
    if shape != [1, num_classes]:
        raise ModelError(
            f"{name} gives outputs {shape} for one input; it must give logits [1, {num_classes}]."
        )


def _imported(path: str, num_classes: int, input_shape: InputShape) -> nn.Module:
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"Cannot import {path} ({error}); write package.module:factory, importable from here."
        ) from error
    if not callable(factory):
        raise ModelError(f"{path} is not a function; it must be called as factory(num_classes, input_shape).")
    try:
        model = factory(num_classes, input_shape)
    except Exception as error:
        raise ModelError(
            f"{path}({num_classes}, {tuple(input_shape)}) raised {type(error).__name__}: {error}."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model
