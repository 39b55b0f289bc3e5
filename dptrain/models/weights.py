"""Weights from a safetensors file, and a report of what became of each tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import nn

from dptrain.models.errors import ModelError
from dptrain.models.head import in_head


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
        name: value.float() if value.is_floating_point() else value for name, value in _read(path).items()
    }
    own = model.state_dict()
    is_head = in_head(model)
    fitted = _adapt(model, stored)

    matched, adapted, reset, wrong = [], [], [], []
    for name, target in own.items():
        value = fitted.get(name)
        if value is not None and value.shape == target.shape:
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


def _read(path: Path | str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ModelError(f"There is no weight file {path}; check --weights.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({error}); fetch or save it again."
        ) from error


def _adapt(model: nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's adaptation of position tables and kernels, then of the stem to the channels."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    fitted = dict(adapt(dict(stored), model)) if adapt is not None else dict(stored)
    config = getattr(model, "pretrained_cfg", None) or {}
    stem = config.get("first_conv")
    for name in [stem] if isinstance(stem, str) else stem or ():
        kernel, own = fitted.get(f"{name}.weight"), model.state_dict().get(f"{name}.weight")
        if kernel is not None and own is not None and kernel.shape[1] == 3 != own.shape[1]:
            fitted[f"{name}.weight"] = adapt_input_conv(own.shape[1], kernel)
    return fitted
