"""Float32 matrix products on a CPU, by the library that is faster there.

PyTorch hands them to Intel's MKL. On AMD's processors with AVX-512 oneDNN, which PyTorch brings along for
convolutions, is about twice as fast forward and to the inputs, and faster for most gradients of weights
(`results/cpu-products.json`). The engine does the products of linear maps itself, so it can choose; in other
types, on other machines and where products are small it does as PyTorch does.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from dptrain.core.processors import processor

#: of tensors: under make_fx (``compile.py``) they are fake
KINDS = (Tensor, Parameter, FakeTensor)
#: multiplications of a product from which on oneDNN's preparations do not matter
WORTHWHILE = 2**22
#: multiplications for each element that has to be transposed for oneDNN from which on that pays
PAYS = 180


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is such a processor; by its name alone, so that runs can be repeated."""
    backends = torch.backends
    return (
        "AMD" in processor()
        and backends.cpu.get_cpu_capability() == "AVX512"
        and backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: ``[..., K]``, ``[N, K]``, ``[N]`` -> ``[..., N]``."""
    if x.numel() * weight.shape[0] >= WORTHWHILE and _suits(x, weight):
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``[..., N] @ [N, K]``."""
    if left.numel() * right.shape[1] >= WORTHWHILE and _suits(left, right):
        return by_onednn(left, right.mT)
    return left @ right


def add_product(into: Tensor | None, rows: Tensor, cols: Tensor) -> Tensor:
    """``rows^T cols``, of ``[T, R]`` and ``[T, C]``, added to ``into [R, C]`` in place if there is one."""
    if rows.numel() * cols.shape[1] >= WORTHWHILE and _suits(rows, cols):
        total = by_onednn(rows.mT, cols.mT)
        return total if into is None else into.add_(total)
    return rows.mT @ cols if into is None else into.addmm_(rows.mT, cols)


def each(rows: Tensor, cols: Tensor, out: Tensor | None = None) -> Tensor:
    """``rows[b]^T cols[b]``, of ``[B, T, R]`` and ``[B, T, C]``: ``[B, R, C]``, in ``out`` if there is
    one."""
    positions, height, width = rows.shape[1], rows.shape[2], cols.shape[2]
    # Elements to be transposed: oneDNN takes the left operand with its positions side by side. Swapped, it is
    # the right one, which may be smaller, and the product comes the wrong way round.
    turned = 0 if rows.stride(1) == 1 else positions * height
    otherwise = ((0 if cols.stride(1) == 1 else positions) + height) * width
    swapped, turned = otherwise < turned, min(turned, otherwise)
    if positions * height * width < max(WORTHWHILE, PAYS * turned) or not _suits(rows, cols):
        return torch.bmm(rows.mT, cols, out=out)
    if type(rows) is FakeTensor:
        found = torch.ops.dptrain.onednn_each(rows, cols, swapped)
        return found if out is None else out.copy_(found)
    return _each_by_onednn(rows, cols, swapped, out)


def _each_by_onednn(rows: Tensor, cols: Tensor, swapped: bool, out: Tensor | None = None) -> Tensor:
    out = rows.new_empty(len(rows), rows.shape[2], cols.shape[2]) if out is None else out
    for left, right, place in zip(rows.mT, cols.mT, out):
        place.copy_(by_onednn(right, left).mT if swapped else by_onednn(left, right))
    return out


def _suits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN may do a product: not of a subclass of tensors that would do it otherwise, for one."""
    return (
        onednn_is_faster()
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and left.dim() > 1
        and type(left) in KINDS
        and type(right) in KINDS
        and torch._C._get_mkldnn_enabled()
    )


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, by oneDNN."""
    if type(x) is FakeTensor or type(weight) is FakeTensor:
        return torch.ops.dptrain.onednn_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# What stands for products in a graph: Inductor takes oneDNN's own operator for constant weights only, and a
# call for each example would make graphs long.


@torch.library.custom_op(
    "dptrain::onednn_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def _linear_in_graphs(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_linear_in_graphs.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "dptrain::onednn_each", mutates_args=(), schema="(Tensor rows, Tensor cols, bool swapped) -> Tensor"
)
def _each_in_graphs(rows, cols, swapped):
    return _each_by_onednn(rows, cols, swapped)


@_each_in_graphs.register_fake
def _(rows, cols, swapped):
    return rows.new_empty(len(rows), rows.shape[2], cols.shape[2])
