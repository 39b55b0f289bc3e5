"""What a filter of gradients remembers, as tensors and JSON-able numbers."""

from __future__ import annotations

from typing import Any

import torch

from dptrain.torch import Denoiser
from dptrain.training.checkpoint import CheckpointError

Tensors = dict[str, torch.Tensor]

KINDS = ("previous", "estimate")


def denoiser_state(denoiser: Denoiser) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by "kind/parameter name", everything else)."""
    numbers = denoiser.state_dict()
    tensors = {f"{kind}/{name}": value for kind in KINDS for name, value in numbers.pop(kind).items()}
    return tensors, numbers


def restore_denoiser(denoiser: Denoiser, tensors: Tensors, numbers: Any) -> None:
    """Give a filter of the same making what `denoiser_state` took.

    Raises:
        CheckpointError: it is of another one.
    """
    kinds: dict[str, Any] = {kind: {} for kind in KINDS}
    try:
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = value
        denoiser.load_state_dict(kinds | numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the filter's state in the checkpoint is of another one: resume with the settings and the "
            "versions that it was made with."
        ) from error
