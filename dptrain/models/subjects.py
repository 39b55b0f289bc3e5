"""A model by name together with a loss and a batch of random examples, for `dptrain check`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptrain.models import hugging_face
from dptrain.models.build import build
from dptrain.models.errors import ModelError
from dptrain.models.footprint import require_room
from dptrain.models.names import PAPER_MODELS, timm_name
from dptrain.models.preferences import preferences
from dptrain.models.small import SMALL
from dptrain.models.weights import load_weights

CHANNELS, SMALL_IMAGE = 3, 32


@dataclass(frozen=True)
class Choices:
    """How to build a subject. What does not apply to it is ignored; None is the model's own choice."""

    batch_size: int = 2
    num_classes: int = 10
    image_size: int | None = None
    length: int | None = None
    task: str | None = None
    config: tuple[str, ...] = ()
    weights: Path | None = None
    #: what may be used for the check; a model that is too large is refused before it is built
    room_bytes: int | None = None

    @property
    def origin(self) -> str:
        """Of the weights, in words."""
        return "random weights" if self.weights is None else f"weights of {self.weights}"


@dataclass(frozen=True)
class Subject:
    """What is checked. ``loss_fn(model, batch)`` gives one loss per example."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Any
    #: what was built, in words
    description: str


def subject(name: str, choices: Choices) -> Subject:
    """Build what `name` says.

    name: a small network, a model of the paper or a timm name (random images at the model's own
    size); a model type or class of transformers, a folder or JSON file with its configuration, or
    `hf:NAME` (random tokens with padding, or images); `package.module:factory`, which returns a model for
    images or (model, loss_fn, batch). Raises ModelError.
    """
    if choices.batch_size < 1:
        raise ModelError(f"--batch-size must be at least 1, and is {choices.batch_size}.")
    if hugging_face.knows(name):
        return Subject(*hugging_face.build(name, choices))
    if choices.config or choices.task:
        raise ModelError(
            f"--config and --task are for models of transformers, and {name!r} is none of them; "
            "write for example bert, gpt2, LlamaForCausalLM or a folder with a config.json."
        )
    if ":" in name:
        return _imported(name, choices)
    return _images(name, choices)


def _images(name: str, choices: Choices) -> Subject:
    """A network of ours or of timm, cross-entropy, noise for images."""
    if name not in SMALL and ":" not in name and not timm.is_model(timm_name(name)):
        known = [*SMALL, *PAPER_MODELS, *hugging_face.model_types(), *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; small networks are {', '.join(SMALL)}."
        raise ModelError(f"There is no model {name!r}{hint}")
    size = choices.image_size or preferences(name).image_size or SMALL_IMAGE
    shape = (CHANNELS, size, size)
    if name not in SMALL and timm.is_model(timm_name(name)) and choices.room_bytes is not None:
        require_room(name, lambda: timm.create_model(timm_name(name)), choices, "choose a smaller model")
    model = build(name, choices.num_classes, shape, weights=choices.weights)
    batch = random_images(choices.batch_size, shape), random_labels(choices.batch_size, choices.num_classes)
    return Subject(model.train(), cross_entropy, batch, f"{name}, {size} x {size} pixels, {choices.origin}")


def random_images(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def random_labels(count: int, num_classes: int) -> Tensor:
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(1))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """``[B]``, of (inputs, labels)."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def _imported(path: str, choices: Choices) -> Subject:
    """What the factory returns: a subject of its own, or a model for images."""
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        wants = inspect.signature(factory).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"Cannot import {path} ({error}); write package.module:factory, importable from here."
        ) from error
    size = choices.image_size or SMALL_IMAGE
    shape = (CHANNELS, size, size)
    if any(
        p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in wants if p.kind is not p.VAR_KEYWORD
    ):
        return _images(path, choices)  # called as factory(num_classes, input_shape)
    try:
        made = factory()
    except Exception as error:
        raise ModelError(f"{path}() raised {type(error).__name__}: {error}.") from error
    batch: Any
    if isinstance(made, nn.Module):
        model, loss_fn = made, cross_entropy
        batch = (
            random_images(choices.batch_size, shape),
            random_labels(choices.batch_size, choices.num_classes),
        )
    elif isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[1]):
        model, loss_fn, batch = made
    else:
        raise ModelError(
            f"{path}() returned a {type(made).__name__}; it must return a torch.nn.Module, or "
            "(model, loss_fn, batch)."
        )
    if choices.weights is not None:
        load_weights(model, choices.weights)
    _try(path, model, loss_fn, batch)
    return Subject(model, loss_fn, batch, path)


def _try(path: str, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
    """A mistake in the given code is best shown before anything else is done with it."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            loss_fn(model.eval(), batch)
    except Exception as error:
        raise ModelError(
            f"The loss of {path} cannot be computed: {type(error).__name__}: {error}; a model alone must "
            f"read images [B, {CHANNELS}, H, W] (--image-size) and give logits."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
