"""Tensors of which each rank holds some rows (``torch.distributed.tensor.DTensor``).

Nothing of it is imported unless it is in use.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from dptrain.core.noise import Span


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one over several ranks."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(whole: Any, part: Tensor) -> Tensor:
    """A sharded tensor like this one, of which this rank has this part."""
    from torch.distributed.tensor import DTensor

    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def rows_of(length: int, ranks: int, rank: int) -> slice:
    """A rank's rows of a tensor sharded by its first dimension: the first ranks have equal numbers, the last
    ones what is left."""
    chunk = -(-length // ranks)
    return slice(min(chunk * rank, length), min(chunk * (rank + 1), length))


def span_of(whole: Any) -> Span:
    """Which elements of a tensor sharded by its first dimension this rank has."""
    rows = rows_of(whole.shape[0], whole.device_mesh.size(), whole.device_mesh.get_local_rank())
    return Span(rows.start * torch.Size(whole.shape[1:]).numel(), whole.numel())
