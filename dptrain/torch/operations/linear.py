"""Linear maps in all their guises: linear, matmul and its kin, addmm, einsum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..capture import Capture
from ..errors import Refused
from ..functions import GroupedLinearFunction, LinearFunction
from ..uses.broadcast import Broadcast
from ..uses.linear import GroupedLinear, Linear
from .generic import generic
from .values import entering, lowered, origin


def linear_map(capture: Capture, x: Tensor, weight, bias, transposed: bool, operation: str) -> Tensor:
    """``x W^T + b`` (or ``x W + b`` if ``transposed``) with a two-dimensional parameter weight."""
    if x.is_complex() or weight.is_complex():
        y = _complex(
            capture, x, weight, lambda part, w: linear_map(capture, part, w, None, transposed, operation)
        )
        return y if bias is None else capture(torch.add, capture.mark_data(y), bias)
    x = lowered(x)
    weight_use = None
    if capture.is_parameter(weight):
        weight_use = capture.use(Linear(transposed), weight, operation)
    bias_use = None
    if bias is not None and capture.is_parameter(bias):
        aligned = (1,) * (x.dim() - 1) + tuple(bias.shape)
        bias_use = capture.use(Broadcast(aligned), bias, operation + " bias")
    w = entering(weight, x.dtype)
    b = None if bias is None else entering(bias, x.dtype)
    return LinearFunction.apply(x, w.mT if transposed else w, b, capture.anchor, weight_use, bias_use)


def linear(capture, func, input, weight, bias=None):
    plain = capture.is_data(input) and not capture.is_data(weight)
    if not plain or (bias is not None and (capture.is_data(bias) or bias.dim() > 1)):
        out = capture(torch.matmul, input, weight.mT)
        return out if bias is None else capture(torch.add, out, bias)
    return linear_map(capture, input, weight, bias, False, "linear")


def addmm(capture, func, input, mat1, mat2, *, beta=1, alpha=1):
    if beta == 1 and alpha == 1 and input.dim() == 1 and capture.is_data(mat1) and not capture.is_data(mat2):
        return linear_map(capture, mat1, mat2, input, True, "addmm")
    out = capture(torch.matmul, mat1, mat2)
    out = out if alpha == 1 else capture(torch.mul, out, alpha)
    return (
        out if beta == 0 else capture(torch.add, out, input if beta == 1 else capture(torch.mul, input, beta))
    )


def baddbmm(capture, func, input, batch1, batch2, *, beta=1, alpha=1):
    return addmm(capture, func, input, batch1, batch2, beta=beta, alpha=alpha)


def _complex(capture: Capture, x: Tensor, value: Tensor, multiply) -> Tensor:
    """A product of complex numbers by real ones: the value is used by its parts."""

    def parts(t: Tensor) -> tuple[Tensor, Tensor | None]:
        if not t.is_complex():
            return t, None
        pairs = torch.view_as_real(t.resolve_conj())
        if capture.is_data(t):
            capture.mark_data(pairs)
        return capture(torch.select, pairs, -1, 0), capture(torch.select, pairs, -1, 1)

    (xr, xi), (vr, vi) = parts(x), parts(value)
    real, imaginary = multiply(xr, vr), torch.zeros(())
    if xi is not None and vi is not None:
        real = real - multiply(xi, vi)
    if vi is not None:
        imaginary = imaginary + multiply(xr, vi)
    if xi is not None:
        imaginary = imaginary + multiply(xi, vr)
    return torch.complex(real, imaginary)


def dot(capture, func, input, other):
    return capture(torch.mul, input, other).sum()


def outer(capture, func, input, vec2):
    columns = capture(torch.Tensor.unsqueeze, input, 1), capture(torch.Tensor.unsqueeze, vec2, 0)
    return capture(torch.mul, *columns)


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
    if other.dim() == 1:
        return capture(torch.mul, input, other).sum(-1)
    smallest = origin(other)
    if smallest.shape[-2:] == other.shape[-2:]:
        other = smallest
    else:  # expanded along the axes of the matrix itself, which must stay
        for axis in range(other.dim() - 2):
            other = other.narrow(axis, 0, 1) if other.stride(axis) == 0 else other
    if other.shape[:-2].numel() == 1:
        out = linear_map(capture, input, other.reshape(other.shape[-2:]), None, True, "matmul")
        missing = other.dim() - max(2, input.dim())  # leading axes of size one
        return out.reshape((1,) * max(0, missing) + tuple(out.shape))
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
    y = grouped_map(capture, x, len(groups), value)
    order = [*groups, *free, n, n + 1]
    return y.permute([order.index(i) for i in range(n + 2)])


def grouped_map(capture: Capture, x: Tensor, groups: int, value: Tensor) -> Tensor:
    """``x [*groups, *free, K]`` by ``value [prod(groups), K, N]``."""
    if x.is_complex() or value.is_complex():
        return _complex(capture, x, value, lambda part, v: grouped_map(capture, part, groups, v))
    lead = x.shape[:groups]
    free = x.shape[groups:-1]
    x = lowered(x.reshape(lead.numel(), free.numel(), x.shape[-1]))
    use = capture.use(GroupedLinear(), value, "matmul")
    y = GroupedLinearFunction.apply(x, value.detach().to(x.dtype), capture.anchor, use)
    return y.reshape(*lead, *free, y.shape[-1])


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
        y = linear_map(capture, x, weight, None, True, "einsum")
    else:
        weight = value.reshape(volume(group), volume(inner), volume(new))
        y = grouped_map(capture, x, len(group), weight)
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


def grouped_mm(capture, func, input, weight, offs=None, *rest, **kwargs):
    """One matrix for each run of rows, as experts are computed: a linear map for each.

    ``input [N, K]`` sorted by group, ``weight [E, K, M]``, ``offs [E]`` where each group ends.
    """
    offs = kwargs.pop("offs", offs)
    bias = kwargs.pop("bias", None)
    extra = [v for v in (*rest, *kwargs.values()) if v is not None]
    plain = not extra and bias is None and offs is not None and input.dim() == 2 and weight.dim() == 3
    if not plain or not capture.is_data(input) or capture.is_data(weight):
        raise Refused(
            f"{func.__name__} on shapes {tuple(input.shape)} and {tuple(weight.shape)} has no rule: pass "
            "rows [N, K] of data, weights [E, K, M] and offs, and neither a bias nor an output type."
        )
    start, out = 0, []
    for matrix, end in zip(weight, offs.tolist()):
        rows = capture.mark_data(input[start:end])
        out.append(linear_map(capture, rows, matrix, None, True, "grouped_mm"))
        start = end
    if start < len(input):  # rows of no group, which the kernel leaves as they are
        out.append(input.new_zeros(len(input) - start, weight.shape[2], dtype=out[0].dtype))
    return torch.cat(out)
