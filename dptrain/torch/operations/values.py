"""How parameter-only values enter data: as small as they can be, detached, at the shape that is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..capture import Capture
from ..functions import ExpandFunction
from ..uses.broadcast import Broadcast

SOURCE = "_dptrain_source"  # what a parameter-only value was expanded from


def compact(value: Tensor) -> Tensor:
    """Undo expansions: an axis of stride 0 becomes an axis of size 1."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride())):
        if stride == 0 and size > 1:
            value = value.narrow(axis, 0, 1)
    return value


def origin(value: Tensor) -> Tensor:
    """The smallest value that broadcasts to ``value``."""
    while (source := getattr(value, SOURCE, None)) is not None:
        value = source
    return compact(value)


def spread(capture: Capture, value: Tensor, shape: torch.Size | tuple, operation: str) -> Tensor:
    """Let a parameter-only value enter data at ``shape``, to which it broadcasts."""
    value = origin(value)
    if value.is_complex():  # as pairs of real numbers, of which the norm is the same
        pairs = torch.view_as_real(value.resolve_conj())
        return capture.mark_data(
            torch.view_as_complex(spread(capture, pairs, (*shape, 2), operation).contiguous())
        )
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if not value.is_floating_point():
        return value.detach().expand(shape)
    use = capture.use(Broadcast(aligned), value, operation)
    return capture.mark_data(ExpandFunction.apply(value.detach(), torch.Size(shape), capture.anchor, use))


def entering(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter-only value as an operation on data takes it: detached, in the type of the data."""
    value = value.detach()
    return value if value.dtype == dtype else value.to(dtype)


def forget(value: Tensor) -> None:
    """A value that is written to is no longer what it was expanded from."""
    for tensor in (value, value._base):
        if tensor is not None and hasattr(tensor, SOURCE):
            delattr(tensor, SOURCE)


def remember(capture: Capture, out: Tensor, source: Tensor | None) -> Tensor:
    if source is not None and out.requires_grad and capture.is_parameter(source):
        setattr(out, SOURCE, source)
    return out


def detached(capture: Capture, tree: Any) -> Any:
    return tree_map(lambda t: t.detach() if capture.is_parameter(t) else t, tree)


def lowered(tensor: Tensor) -> Tensor:
    """To autocast's compute type, as the operation itself would do."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def raised(tensor: Tensor) -> Tensor:
    """To float32 under autocast, as norm layers do."""
    return tensor.float() if torch.is_autocast_enabled(tensor.device.type) else tensor
