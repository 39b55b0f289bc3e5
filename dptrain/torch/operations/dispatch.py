"""Which rule an operation gets when parameters meet data in it, and what parameters do alone."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import Capture
from ..errors import Refused
from .convolution import convolution
from .generic import generic
from .joining import attention, cat, column_stack, prelu
from .linear import addmm, baddbmm, dot, einsum, grouped_mm, linear, matmul, outer
from .norms import (
    BATCH_STATISTICS,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    refuse_batch_statistics,
    rms_norm,
)
from .pointwise import pointwise, pointwise_name
from .recurrent import cell, layer
from .scattering import NAMES as SCATTERING
from .tables import embedding, embedding_bag, getitem, index_select, setitem
from .values import compact, detached, forget, remember

#: operations that ask a tensor for its shape, type or device only
KEEPS_VALUES = {"type_as", "view_as", "reshape_as", "to"}
METADATA = KEEPS_VALUES | {
    "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "bernoulli_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_tensor", "result_type", "promote_types", "is_same_size", "can_cast",
}  # fmt: skip

#: operations without a gradient
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "isclose", "logical_and", "logical_or"}

RULES = {
    "linear": linear,
    "addmm": addmm,
    "baddbmm": baddbmm,
    "matmul": matmul,
    "__matmul__": matmul,
    "__rmatmul__": matmul,
    "mm": matmul,
    "mv": matmul,
    "dot": dot,
    "outer": outer,
    "ger": outer,
    "bmm": matmul,
    "einsum": einsum,
    "grouped_mm": grouped_mm,
    "_grouped_mm": grouped_mm,
    "grouped_mm_fallback": grouped_mm,  # transformers'
    "conv1d": convolution(1, False),
    "conv2d": convolution(2, False),
    "conv3d": convolution(3, False),
    "conv_transpose1d": convolution(1, True),
    "conv_transpose2d": convolution(2, True),
    "conv_transpose3d": convolution(3, True),
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    "__getitem__": getitem,
    "index_select": index_select,
    "__setitem__": setitem,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": cat,
    "column_stack": column_stack,
    "scaled_dot_product_attention": attention,
    "lstm": layer,
    "gru": layer,
    "rnn_tanh": layer,
    "rnn_relu": layer,
    "lstm_cell": cell,
    "gru_cell": cell,
    "rnn_tanh_cell": cell,
    "rnn_relu_cell": cell,
    "prelu": prelu,
}


def is_special(name: str) -> bool:
    """Whether an operation of this name may want attention though no parameter takes part in it."""
    return not name or name in METADATA or name in SCATTERING or name in BATCH_STATISTICS


def mixed(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """An operation in which a parameter-only value meets data."""
    name = getattr(func, "__name__", "")
    refuse_batch_statistics(func, args, kwargs)
    rule = RULES.get(name)
    if rule is not None:
        return rule(capture, func, *args, **kwargs)
    operation = pointwise_name(name)
    if operation is not None:
        if operation in COMPARISONS:
            return func(*detached(capture, args), **detached(capture, kwargs))
        return pointwise(capture, func, name, args, kwargs)
    if isinstance(func, types.FunctionType) and func.__module__.startswith("torch."):
        return capture.reenter(func, args, kwargs)
    return generic(capture, func, args, kwargs)


def chosen(capture: Capture, func, args: tuple) -> tuple | None:
    """The arguments with integers in place of single indices that data made, if there are any.

    ``experts[i]`` for an expert ``i`` that some token of the batch was sent to: which parameter is
    used is then a matter of routing, and its value as parameter-only as ever.
    """
    if getattr(func, "__name__", "") not in ("__getitem__", "select") or not capture.is_parameter(args[0]):
        return None

    def single(item: Any) -> Any:
        lone = isinstance(item, Tensor) and item.dim() == 0 and not item.is_floating_point()
        return int(item) if lone and item.dtype != torch.bool else item

    settled = tree_map(single, args[1:])
    return None if any(map(capture.is_data, tree_leaves(settled))) else (args[0], *settled)


def metadata(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """An operation that asks all tensors but the first for their shape, type or device only.

    The result is what the first is if it holds its values (``p.type_as(x)`` is still a parameter),
    and otherwise a constant, unless data fills it.
    """
    first, rest = args[:1], detached(capture, args[1:])
    kwargs = detached(capture, kwargs)
    fills = any(map(capture.is_data, (*rest, *kwargs.values())))
    if func.__name__ in KEEPS_VALUES:
        out = func(*first, *rest, **kwargs)
        return capture.mark_data(out) if capture.is_data(first[0]) else out
    out = func(*detached(capture, first), *rest, **kwargs)
    # what is made like data will hold data
    like = func.__name__.endswith("_like") and first and capture.is_data(first[0])
    return capture.mark_data(out) if (fills or like) and isinstance(out, Tensor) else out


def parameter_only(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """An operation on parameters and constants: ordinary autograd.

    Expansions are remembered, so that a value which meets data is never larger than it must be,
    and repetitions become expansions.
    """
    name = getattr(func, "__name__", "")
    if name in ("register_hook", "register_post_accumulate_grad_hook"):
        raise Refused(
            "the forward pass hooks the gradient of a value made of parameters, where it would see sums and "
            "not the gradients of single examples: remove the hook, or use PrivateGradient.map."
        )
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if name in ("repeat", "tile") and source is not None and capture.is_parameter(source):
        return _repeated(capture, func, args, kwargs)
    if source is not None and name.endswith("_") and not name.endswith("__"):
        forget(source)
    if func is F.embedding and capture.is_parameter(args[1] if len(args) > 1 else kwargs["weight"]):
        indices = args[0] if args else kwargs["input"]
        if isinstance(indices, Tensor) and 0 in indices.stride():
            small = compact(indices)
            value = func(small, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
            shape = (*indices.shape, value.shape[-1])
            return remember(capture, value.expand(shape), value)
    out = _in_full_precision(func, args, kwargs)
    if isinstance(out, Tensor) and name in ("expand", "expand_as", "broadcast_to"):
        return remember(capture, out, source)
    return out


def _repeated(capture: Capture, func, args: tuple, kwargs: dict) -> Tensor:
    """A repetition remembers what it repeats where that broadcasts to it."""
    source = args[0]
    counts = args[1:] or tuple(kwargs.values())
    counts = tuple(counts[0]) if isinstance(counts[0], (tuple, list)) else tuple(counts)
    out = func(*args, **kwargs)
    sizes = (1,) * (out.dim() - source.dim()) + tuple(source.shape)
    counts = (1,) * (out.dim() - len(counts)) + counts
    if all(n == 1 or s == 1 for n, s in zip(counts, sizes)):
        return remember(capture, out, source)
    return out


def _in_full_precision(func, args: tuple, kwargs: dict) -> Any:
    """Parameters alone are computed without autocast, so that sums pull back through float32."""
    device = next((t.device.type for t in args if isinstance(t, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return func(*args, **kwargs)
    try:
        with torch.autocast(device, enabled=False):
            return func(*args, **kwargs)
    except RuntimeError:  # types that only autocast reconciles: the planner sees to narrow values
        return func(*args, **kwargs)
