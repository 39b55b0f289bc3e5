"""What each torch operation does when parameters meet data in it.

``mixed`` dispatches: a rule by name, the pointwise operations as a family (known by the tag that
PyTorch itself puts on them), torch's own Python functions by looking inside them, and the generic
rule for the rest. Rules are written in terms of other operations where they can be.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .capture import Capture
from .errors import Refused
from .functions import (
    ConvolutionFunction,
    ExpandFunction,
    GroupedLinearFunction,
    GroupNormFunction,
    LayerNormFunction,
    LinearFunction,
    LookupFunction,
)
from .uses.broadcast import Broadcast, PerExample
from .uses.convolution import Convolution
from .uses.linear import GroupedLinear, Linear
from .uses.lookup import Lookup

SOURCE = "_dptrain_source"  # what a parameter-only value was expanded from

#: operations that ask a tensor for its shape, type or device only
METADATA = {
    "type_as", "view_as", "reshape_as", "to", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "bernoulli_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_tensor", "result_type", "promote_types", "is_same_size", "can_cast",
}  # fmt: skip

#: operations without a gradient
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "isclose", "logical_and", "logical_or"}


def mixed(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """An operation in which a parameter-only value meets data."""
    name = getattr(func, "__name__", "")
    refuse_batch_statistics(func, args, kwargs)
    if name in METADATA or name in ("__get__", "size", "dim", "numel"):
        return func(*_detached(capture, args), **_detached(capture, kwargs))
    rule = RULES.get(name)
    if rule is not None:
        return rule(capture, func, *args, **kwargs)
    operation = pointwise_name(name)
    if operation is not None:
        if operation in COMPARISONS:
            return func(*_detached(capture, args), **_detached(capture, kwargs))
        return pointwise(capture, func, name, args, kwargs)
    if isinstance(func, types.FunctionType) and func.__module__.startswith("torch."):
        return capture.reenter(func, args, kwargs)
    return generic(capture, func, args, kwargs)


def parameter_only(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """An operation on parameters and constants: ordinary autograd.

    Expansions are remembered, so that a value which meets data is never larger than it must be,
    and repetitions become expansions.
    """
    name = getattr(func, "__name__", "")
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if name in ("repeat", "tile") and source is not None and capture.is_parameter(source):
        counts = torch.Size(args[1:] if isinstance(args[1], int) else args[1])
        lead = len(counts) - source.dim()
        sizes = (1,) * lead + tuple(source.shape)
        if lead >= 0 and all(n == 1 or s == 1 for n, s in zip(counts, sizes)):
            func, name, args = (
                torch.Tensor.expand,
                "expand",
                (source, tuple(n * s for n, s in zip(counts, sizes))),
            )
    if func is F.embedding and capture.is_parameter(args[1] if len(args) > 1 else kwargs["weight"]):
        indices = args[0] if args else kwargs["input"]
        if isinstance(indices, Tensor) and 0 in indices.stride():
            small = compact(indices)
            value = func(small, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
            shape = (*indices.shape, value.shape[-1])
            return _remember(capture, value.expand(shape), value)
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and name in ("expand", "expand_as", "broadcast_to"):
        return _remember(capture, out, source)
    return out


def _remember(capture: Capture, out: Tensor, source: Tensor | None) -> Tensor:
    if source is not None and out.requires_grad and capture.is_parameter(source):
        setattr(out, SOURCE, source)
    return out


def refuse_batch_statistics(func, args: tuple, kwargs: dict) -> None:
    if getattr(func, "__name__", "") not in (
        "batch_norm",
        "_batch_norm_impl_index",
        "native_batch_norm",
    ):
        return
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training:
        raise Refused(
            "BatchNorm in training mode lets one example move another's gradient, so no "
            "per-example gradient exists: convert it to GroupNorm, or call .eval() on the "
            "BatchNorm layers to use their running statistics."
        )


def _detached(capture: Capture, tree: Any) -> Any:
    return tree_map(lambda t: t.detach() if capture.is_parameter(t) else t, tree)


# ---------------------------------------------------------------------- values into data


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
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if not value.is_floating_point():
        return value.detach().expand(shape)
    use = capture.use(Broadcast(aligned), value, operation)
    return capture.mark_data(ExpandFunction.apply(value.detach(), torch.Size(shape), capture.anchor, use))


@functools.cache
def pointwise_name(name: str) -> str | None:
    """The aten name of a pointwise operation however it is spelt (``__iadd__``, ``add_``), or None."""
    base = name
    if base.startswith("__") and base.endswith("__"):
        base = base[2:-2]
        spelt = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
        for prefix in ("", "r", "i"):
            stem = base[len(prefix) :] if base.startswith(prefix) else ""
            stem = spelt.get(stem, stem)
            if stem and _is_pointwise(stem):
                return stem
        return None
    stem = base[:-1] if base.endswith("_") else base
    stem = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
            "rtruediv": "div", "rpow": "pow"}.get(stem, stem)  # fmt: skip
    return stem if _is_pointwise(stem) else None


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    tags = [getattr(packet, overload).tags for overload in packet.overloads()]
    return bool(tags) and any(torch.Tag.pointwise in t for t in tags)


def pointwise(capture: Capture, func, name: str, args: tuple, kwargs: dict) -> Any:
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    if in_place and capture.is_parameter(args[0]):
        raise Refused(
            f"{name} writes data in place into a value made of parameters only, whose gradient "
            "would be lost: use the operation that returns a new tensor instead."
        )
    leaves, tree = tree_flatten((args, kwargs))
    shape = np.broadcast_shapes(*[t.shape for t in leaves if isinstance(t, Tensor)])
    entered = [spread(capture, t, shape, name) if capture.is_parameter(t) else t for t in leaves]
    args, kwargs = tree_unflatten(entered, tree)
    out = func(*args, **kwargs)
    if in_place:
        capture._mark_results(func, args, kwargs, out)
    return out


# ---------------------------------------------------------------------- linear maps


def _lowered(tensor: Tensor) -> Tensor:
    """To autocast's compute type, as the operation itself would do."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _raised(tensor: Tensor) -> Tensor:
    """To float32 under autocast, as norm layers do."""
    return tensor.float() if torch.is_autocast_enabled(tensor.device.type) else tensor


def _linear(capture: Capture, x: Tensor, weight, bias, transposed: bool, operation: str) -> Tensor:
    """``x W^T + b`` (or ``x W + b`` if ``transposed``) with a two-dimensional parameter weight."""
    x = _lowered(x)
    weight_use = None
    if capture.is_parameter(weight):
        weight_use = capture.use(Linear(transposed), weight, operation)
    bias_use = None
    if bias is not None and capture.is_parameter(bias):
        aligned = (1,) * (x.dim() - 1) + tuple(bias.shape)
        bias_use = capture.use(Broadcast(aligned), bias, operation + " bias")
    w = weight.detach().mT if transposed else weight.detach()
    b = None if bias is None else bias.detach()
    return LinearFunction.apply(
        x, w.to(x.dtype), None if b is None else b.to(x.dtype), capture.anchor, weight_use, bias_use
    )


def linear(capture, func, input, weight, bias=None):
    plain = capture.is_data(input) and not capture.is_data(weight)
    if not plain or (bias is not None and (capture.is_data(bias) or bias.dim() > 1)):
        out = capture(torch.matmul, input, weight.mT)
        return out if bias is None else capture(torch.add, out, bias)
    return _linear(capture, input, weight, bias, False, "linear")


def addmm(capture, func, input, mat1, mat2, *, beta=1, alpha=1):
    if beta == 1 and alpha == 1 and input.dim() == 1 and capture.is_data(mat1) and not capture.is_data(mat2):
        return _linear(capture, mat1, mat2, input, True, "addmm")
    out = capture(torch.matmul, mat1, mat2)
    out = out if alpha == 1 else capture(torch.mul, out, alpha)
    return (
        out if beta == 0 else capture(torch.add, out, input if beta == 1 else capture(torch.mul, input, beta))
    )


def baddbmm(capture, func, input, batch1, batch2, *, beta=1, alpha=1):
    return addmm(capture, func, input, batch1, batch2, beta=beta, alpha=alpha)


def matmul(capture, func, input, other):
    if func.__name__ == "__rmatmul__":
        input, other = other, input
    if not capture.is_data(input):  # W x = (x^T W^T)^T
        if other.dim() == 1:
            return capture(torch.matmul, other, input.mT)
        flipped = capture.mark_data(other.mT)
        if input.dim() == 1:
            return capture(torch.matmul, flipped, input)
        return capture(torch.matmul, flipped, input.mT).mT
    if not capture.is_parameter(other):
        raise Refused(f"{func.__name__} with operands of shapes {tuple(input.shape)}, {tuple(other.shape)}")
    other = origin(other)
    if other.dim() == 1:
        return capture(torch.mul, input, other).sum(-1)
    if other.shape[:-2].numel() == 1:
        out = _linear(capture, input, other.reshape(other.shape[-2:]), None, True, "matmul")
        return out.reshape((1,) * (other.dim() - out.dim()) + tuple(out.shape))
    if input.dim() == 1:
        return capture(torch.matmul, capture.mark_data(input.unsqueeze(0)), other).squeeze(-2)
    # axes on which the value varies become groups, the others stay with the data
    batch = np.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    n = len(batch)
    x = input.expand(*batch, *input.shape[-2:])
    sizes = (1,) * (n + 2 - other.dim()) + tuple(other.shape[:-2])
    groups = [i for i in range(n) if sizes[i] > 1]
    free = [i for i in range(n) if sizes[i] == 1]
    value = other.reshape(-1, *other.shape[-2:])
    x = x.permute(*groups, *free, n, n + 1)
    y = _grouped(capture, x, len(groups), value)
    order = [*groups, *free, n, n + 1]
    return y.permute([order.index(i) for i in range(n + 2)])


def _grouped(capture: Capture, x: Tensor, groups: int, value: Tensor) -> Tensor:
    """``x [*groups, *free, K]`` by ``value [prod(groups), K, N]``."""
    lead = x.shape[:groups]
    x = _lowered(x.reshape(-1, *x.shape[groups:]) if groups else x.unsqueeze(0))
    use = capture.use(GroupedLinear(), value, "matmul")
    y = GroupedLinearFunction.apply(x, value.detach().to(x.dtype), capture.anchor, use)
    return y.reshape(*lead, *y.shape[1:])


def einsum(capture, func, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    spec = _einsum_spec(equation, operands)
    if spec is None or len(operands) != 2 or not any(map(capture.is_data, operands)):
        return generic(capture, func, (equation, *operands), {})
    (left, right), out = spec
    x, value = operands
    if not capture.is_data(x):
        x, value, left, right = value, x, right, left
    if not capture.is_parameter(value):
        return generic(capture, func, (equation, *operands), {})
    lone = [i for i in left if i not in right and i not in out]
    if lone:
        x = x.sum([left.index(i) for i in lone])
        left = "".join(i for i in left if i not in lone)
    lone = [i for i in right if i not in left and i not in out]
    if lone:
        value = value.sum([right.index(i) for i in lone])
        right = "".join(i for i in right if i not in lone)
    shared = [i for i in right if i in left]
    group = [i for i in shared if i in out]
    inner = [i for i in shared if i not in out]
    new = [i for i in right if i not in left]
    free = [i for i in left if i not in right]
    size = dict(zip(left, x.shape)) | dict(zip(right, value.shape))
    volume = lambda labels: torch.Size(size[i] for i in labels).numel()  # noqa: E731
    x = x.permute([left.index(i) for i in (*group, *free, *inner)])
    x = x.reshape([size[i] for i in (*group, *free)] + [volume(inner)])
    value = value.permute([right.index(i) for i in (*group, *inner, *new)])
    if volume(group) == 1:
        weight = value.reshape(volume(inner), volume(new))
        y = _linear(capture, x, weight, None, True, "einsum")
    else:
        weight = value.reshape(volume(group), volume(inner), volume(new))
        y = _grouped(capture, x, len(group), weight)
    y = y.reshape([size[i] for i in (*group, *free, *new)])
    order = [*group, *free, *new]
    return y.permute([order.index(i) for i in out])


def _einsum_spec(equation: str, operands) -> tuple[list[str], str] | None:
    """Inputs' and output's labels with the ellipsis written out, None if labels repeat."""
    equation = equation.replace(" ", "")
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        return None
    spare = [c for c in map(chr, range(192, 448)) if c not in equation]
    widest = 0
    for i, (term, operand) in enumerate(zip(terms, operands)):
        if "..." in term:
            width = operand.dim() - len(term) + 3
            widest = max(widest, width)
            terms[i] = term.replace("...", "".join(spare[:width][::-1]))
    if "->" not in equation:
        labels = sorted(set("".join(inputs.replace("...", "").split(","))))
        out = "".join(c for c in labels if inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + out
    out = out.replace("...", "".join(spare[:widest][::-1]))
    if any(len(set(t)) != len(t) for t in terms):
        return None
    for a in terms:  # an ellipsis may broadcast an axis of size one: leave that to the generic rule
        for label in a:
            if len({o.shape[t.index(label)] for t, o in zip(terms, operands) if label in t}) > 1:
                return None
    return terms, out


# ---------------------------------------------------------------------- convolutions


def _tuple(value, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def convolution(n: int, transposed: bool):
    def rule(capture, func, input, weight, bias=None, stride=1, padding=0, *rest, **kwargs):
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = dict(zip(names, rest)) | kwargs
        dilation = _tuple(options.get("dilation", 1), n)
        groups = options.get("groups", 1)
        output_padding = _tuple(options.get("output_padding", 0), n)
        stride = _tuple(stride, n)
        if capture.is_data(weight) or not capture.is_data(input):
            return generic(capture, func, (input, weight, bias, stride, padding, *rest), kwargs)
        if input.dim() != n + 2:
            raise Refused(
                f"{func.__name__} on an input of shape {tuple(input.shape)}, which has no axis for "
                f"the examples: give it {n + 2} axes."
            )
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
            if any(t % 2 for t in total):
                input = F.pad(input, [p for t in reversed(total) for p in (t // 2, t - t // 2)])
                padding = 0
            else:
                padding = tuple(t // 2 for t in total)
        padding = _tuple(padding, n)
        x = _lowered(input)
        weight_use = bias_use = None
        if capture.is_parameter(weight):
            kernel = tuple(weight.shape[2:])
            rule = Convolution(kernel, stride, padding, dilation, transposed, groups)
            weight_use = capture.use(rule, weight, func.__name__)
        if bias is not None and capture.is_parameter(bias):
            bias_use = capture.use(Broadcast((1, *bias.shape)), bias, func.__name__ + " bias")
        geometry = (stride, padding, dilation, transposed, output_padding, groups)
        return ConvolutionFunction.apply(
            x,
            weight.detach().to(x.dtype),
            None if bias is None else bias.detach().to(x.dtype),
            capture.anchor,
            geometry,
            weight_use,
            bias_use,
        )

    return rule


# ---------------------------------------------------------------------- norm layers


def _affine(capture: Capture, y: Tensor, weight, bias, shape: tuple[int, ...]) -> Tensor:
    if weight is not None:
        y = capture(torch.mul, y, weight.reshape(shape))
    if bias is not None:
        y = capture(torch.add, y, bias.reshape(shape))
    return y


def layer_norm(capture, func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *rest, **kwargs):
    shape = list(normalized_shape)
    if not capture.is_data(input):
        raise Refused("layer_norm of a parameter with a weight that depends on data")
    lead = (1,) * (input.dim() - len(shape))
    uses: list[Any] = [None, None]
    for i, (value, label) in enumerate(((weight, ""), (bias, " bias"))):
        if value is not None and capture.is_parameter(value):
            uses[i] = capture.use(Broadcast((*lead, *value.shape)), value, "layer_norm" + label)
    x = _raised(input)
    w, b = (None if v is None else v.detach().to(x.dtype) for v in (weight, bias))
    return LayerNormFunction.apply(x, shape, w, b, eps, capture.anchor, *uses)


def rms_norm(capture, func, input, normalized_shape, weight=None, eps=None):
    y = capture.mark_data(F.rms_norm(_raised(input), normalized_shape, None, eps))
    return _affine(capture, y, weight, None, tuple(weight.shape))


def group_norm(capture, func, input, num_groups, weight=None, bias=None, eps=1e-5, *rest, **kwargs):
    if input.numel() == 0 or not capture.is_data(input):
        return generic(capture, func, (input, num_groups, weight, bias, eps), {})
    x = _raised(input)
    uses: list[Any] = [None, None]
    for i, (value, label) in enumerate(((weight, ""), (bias, " bias"))):
        if value is not None and capture.is_parameter(value):
            uses[i] = capture.use(Broadcast((1, *value.shape)), value, "group_norm" + label)
    w, b = (None if v is None else v.detach().to(x.dtype) for v in (weight, bias))
    return GroupNormFunction.apply(x, num_groups, w, b, eps, capture.anchor, *uses)


def instance_norm(capture, func, input, running_mean=None, running_var=None, weight=None, bias=None,
                  use_input_stats=True, momentum=0.1, eps=1e-5, *rest):  # fmt: skip
    if running_mean is not None:
        raise Refused(
            "instance_norm with running statistics mixes examples in its buffers: set "
            "track_running_stats=False."
        )
    y = capture.mark_data(F.instance_norm(_raised(input), None, None, None, None, True, momentum, eps))
    return _affine(capture, y, weight, bias, (-1,) + (1,) * (input.dim() - 2))


def batch_norm(capture, func, input, running_mean, running_var, weight=None, bias=None, training=False,
               momentum=0.1, eps=1e-5, *rest):  # fmt: skip
    if func is not F.batch_norm:  # torch.batch_norm orders its arguments otherwise
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    if running_mean is None:
        raise Refused("BatchNorm without running statistics mixes examples: convert it to GroupNorm.")
    y = capture.mark_data(F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps))
    return _affine(capture, y, weight, bias, (-1,) + (1,) * (input.dim() - 2))


# ---------------------------------------------------------------------- tables


def _lookup(capture: Capture, table: Tensor, indices: Tensor, padding: int | None) -> Tensor:
    use = capture.use(Lookup(padding, table.dim() - 1), table, "embedding")
    return LookupFunction.apply(indices, table.detach(), capture.anchor, use)


def embedding(capture, func, input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
              scale_grad_by_freq=False, sparse=False):  # fmt: skip
    if max_norm is not None or scale_grad_by_freq:
        raise Refused(
            "an embedding with max_norm or scale_grad_by_freq changes its table by what the whole "
            "batch looks up: turn the option off."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _lookup(capture, weight, input, padding_idx)


def getitem(capture, func, tensor, index):
    while isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if capture.is_parameter(tensor) and integers:
        return _lookup(capture, tensor, index.long(), None)
    return generic(capture, func, (tensor, index), {})


def index_select(capture, func, input, dim, index):
    if capture.is_parameter(input) and input.dim() > 0 and dim % input.dim() == 0 and index.dim() == 1:
        return _lookup(capture, input, index.long(), None)
    return generic(capture, func, (input, dim, index), {})


def setitem(capture, func, tensor, index, value):
    if not capture.is_data(tensor):
        raise Refused(
            "data is written in place into a value made of parameters or constants after parameters "
            "were written into it: write the data first, or use torch.cat or torch.where."
        )
    if capture.is_parameter(value):
        value = spread(capture, value, tensor.detach()[index].shape, "setitem")
    out = func(tensor, index, value)
    capture._mark_results(func, (tensor, index, value), {}, out)
    return out


# ---------------------------------------------------------------------- joining


def cat(capture, func, tensors, *args, **kwargs):
    name = func.__name__
    return func(
        [spread(capture, t, t.shape, name) if capture.is_parameter(t) else t for t in tensors],
        *args,
        **kwargs,
    )


def attention(capture, func, query, key, value, attn_mask=None, *args, **kwargs):
    """Scaled dot product attention: a mask or an operand made of parameters enters expanded."""
    if isinstance(attn_mask, Tensor) and capture.is_parameter(attn_mask):
        batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        shape = (*batch, query.shape[-2], key.shape[-2])
        attn_mask = spread(capture, attn_mask, shape, "attention mask")
    query, key, value = (
        spread(capture, t, t.shape, "attention") if capture.is_parameter(t) else t
        for t in (query, key, value)
    )
    return func(query, key, value, attn_mask, *args, **kwargs)


def prelu(capture, func, input, weight):
    shape = (-1,) + (1,) * (input.dim() - 2) if weight.numel() > 1 else (1,)
    negative = capture(torch.mul, capture(torch.clamp, input, max=0), weight.reshape(shape))
    return capture(torch.add, capture(torch.clamp, input, min=0), negative)


# ---------------------------------------------------------------------- the generic rule


def generic(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """Any operation: give each example its own copy of the value and let autograd do the rest.

    The operation runs under ``torch.vmap``, on batches of one; which axis of each tensor holds the
    examples is what the probe found by comparing two batch sizes. While the probe is looking
    (``capture.layouts is None``) the operation runs as it is.
    """
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    position = len(capture.generic)
    if capture.layouts is None:
        plain = [t.detach() if capture.is_parameter(t) else t for t in leaves]
        args, kwargs = tree_unflatten(plain, tree)
        out = func(*args, **kwargs)
        flat, out_tree = tree_flatten(out)
        shapes = [tuple(leaves[i].shape) for i in tensors]
        capture.generic.append(
            (func.__name__, shapes, [tuple(t.shape) for t in flat if isinstance(t, Tensor)])
        )
        return tree_unflatten(
            [t + 0 * capture.anchor if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat],
            out_tree,
        )
    where_in, where_out = capture.layouts[("generic", position)]
    capture.generic.append(func.__name__)
    batch_size = capture.batch_size
    entered, axes = [], []
    for i, axis in zip(tensors, where_in):
        t = leaves[i]
        if axis is not None:  # examples on an axis of its own: a batch of one for each
            if capture.is_parameter(t):
                t = spread(capture, t, t.shape, func.__name__)
            t = t.unflatten(axis, (batch_size, t.shape[axis] // batch_size))
        elif capture.is_parameter(t):
            use = capture.use(PerExample(), t, func.__name__)
            shape = torch.Size((batch_size, *t.shape))
            t = ExpandFunction.apply(t.detach(), shape, capture.anchor, use)
            axis = 0
        entered.append(t)
        axes.append(axis)

    def one(*parts):
        filled = list(leaves)
        for i, part in zip(tensors, parts):
            filled[i] = part
        a, k = tree_unflatten(filled, tree)
        return tuple(t for t in tree_flatten(func(*a, **k))[0] if isinstance(t, Tensor))

    try:
        outs = torch.vmap(one, tuple(axes), tuple(where_out), randomness="different")(*entered)
    except Exception as error:
        raise Refused(
            f"{func.__name__} combines parameters with data in a way for which there is no rule ({error})."
        ) from error
    outs = [o.flatten(axis, axis + 1) for o, axis in zip(outs, where_out)]
    return outs[0] if len(outs) == 1 else tuple(outs)


RULES = {
    "linear": linear,
    "addmm": addmm,
    "baddbmm": baddbmm,
    "matmul": matmul,
    "__matmul__": matmul,
    "__rmatmul__": matmul,
    "mm": matmul,
    "bmm": matmul,
    "einsum": einsum,
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
    "__getitem__": getitem,
    "index_select": index_select,
    "__setitem__": setitem,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": cat,
    "scaled_dot_product_attention": attention,
    "prelu": prelu,
}
