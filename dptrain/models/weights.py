"""Weights from a safetensors file, and a report of what became of each tensor."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import nn

from dptrain.core.files import MIB, Unreadable, size_of
from dptrain.core.printable import reason
from dptrain.models.errors import ModelError
from dptrain.models.head import in_head

LARGEST_SURPLUS = 1024 * MIB
"""Bytes that a file may have beyond four times the model's: other heads, wider types."""


@dataclass(frozen=True)
class WeightReport:
    """Tensor names by what happened to them."""

    matched: tuple[str, ...]
    adapted: tuple[str, ...]
    """Resampled or reshaped to the model: position tables, patch kernels, the stem's channels."""
    reset: tuple[str, ...]
    """Of the head, absent from the file or of another size: made afresh."""
    unused: tuple[str, ...]
    """In the file, not in the model."""

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors matched"]
        for label, names in (
            ("adapted", self.adapted),
            ("reset", self.reset),
            ("unused", self.unused),
        ):
            if names:
                parts.append(
                    f"{len(names)} {label} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                )
        return "; ".join(parts) + "."


@torch.no_grad()
def load_weights(model: nn.Module, path: Path | str) -> WeightReport:
    """Load `path` into `model` in place, as float32 whatever the stored type.

    Only the head may differ. Raises ModelError if any other tensor is missing or cannot be made to
    fit: a model that is part pre-trained and part random is never made silently.
    """
    stored = {
        name: value.float() if value.is_floating_point() else value
        for name, value in read_tensors(path, model).items()
    }
    own = model.state_dict()
    is_head = in_head(model)
    fitted = _adapt(model, stored, path)

    matched, adapted, reset, wrong = [], [], [], []
    for name, target in own.items():
        value = fitted.get(name)
        if value is not None and value.is_floating_point() != target.is_floating_point():
            wrong.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}")
        elif value is not None and not bool(value.isfinite().all()):
            wrong.append(f"{name} holds values that are not finite")
        elif value is not None and value.shape == target.shape:
            target.copy_(value)
            untouched = (
                name in stored and stored[name].shape == value.shape and torch.equal(stored[name], value)
            )
            (matched if untouched else adapted).append(name)
        elif is_head(name):
            target.zero_()
            reset.append(name)
        else:
            found = "is missing" if value is None else f"is {list(value.shape)}, not {list(target.shape)}"
            wrong.append(f"{name} {found}")
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise ModelError(
            f"{path} does not fit this model: {'; '.join(wrong[:2])}{more}; choose the --model "
            "that the file was saved from."
        )
    unused = tuple(name for name in fitted if name not in own)
    return WeightReport(tuple(matched), tuple(adapted), tuple(reset), unused)


def read_tensors(path: Path | str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file that is not much larger than `model`. Raises ModelError."""
    own = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if not os.path.exists(path):
        raise ModelError(f"There is no weight file {path}; check --weights.")
    try:
        size_of(path, 4 * own + LARGEST_SURPLUS)
        return load_file(path)
    except Unreadable as error:
        raise ModelError(f"{path} {error} for this model; check --weights.") from error
    except Exception as error:  # of safetensors, and of torch for types that it does not know
        raise ModelError(
            f"{path} is not a readable safetensors file ({reason(error)}); fetch or save it again."
        ) from error


def _adapt(model: nn.Module, stored: dict[str, torch.Tensor], path: Path | str) -> dict[str, torch.Tensor]:
    """timm's adaptation of position tables and kernels, then of the stem to the channels."""
    try:
        return _adapted(model, stored)
    except Exception as error:  # timm expects the tensors of its own files
        raise ModelError(
            f"{path} does not fit this model (adapting it fails: {reason(error)}); choose the --model "
            "that the file was saved from."
        ) from error


def _adapted(model: nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    fitted = dict(adapt(dict(stored), model)) if adapt is not None else dict(stored)
    config = getattr(model, "pretrained_cfg", None) or {}
    stem = config.get("first_conv")
    for name in [stem] if isinstance(stem, str) else stem or ():
        kernel, own = fitted.get(f"{name}.weight"), model.state_dict().get(f"{name}.weight")
        if kernel is not None and own is not None and kernel.shape[1] == 3 != own.shape[1]:
            fitted[f"{name}.weight"] = adapt_input_conv(own.shape[1], kernel)
    return fitted
