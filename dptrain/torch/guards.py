"""Checks on what comes in and on what a backward pass did: the escape guard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dptrain.core import checks
from dptrain.core.methods import Method

from .capture import Capture
from .errors import WRITTEN, Refused
from .full_precision import is_full


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable leaf parameters by name, each once however often it is tied."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_callables(model: Any, loss_fn: Any) -> None:
    """Raises TypeError: no module, or nothing that can be called for the losses."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, and is {checks.shown(model)}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (model, batch), and is {checks.shown(loss_fn)}.")


def check_batch(batch: Any, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """The number of examples in a batch, and its mask on the batch's device."""
    tensors = [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError("the batch holds no tensor.")
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"every tensor of a batch must lead with the examples; got shapes {shapes}.")
    (batch_size,) = sizes
    if any(t.layout != torch.strided or t.is_meta for t in tensors):
        raise ValueError("every tensor of a batch must be dense and hold data: convert with to_dense().")
    if batch_size == 0:
        raise ValueError("the batch has no rows: pad it to a fixed size and mask the padding.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch_size,) or mask.dtype != torch.bool:
            what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor of shape ({batch_size},), and is {what}.")
        if mask.layout != torch.strided or mask.is_meta:
            raise ValueError("mask must be dense and hold data, and is on the meta device or sparse.")
        mask = mask.to(tensors[0].device)
    return batch_size, mask


def check_model(model: nn.Module, parameters: dict[str, Tensor], method: Method) -> None:
    if not parameters:
        raise Refused("the model has no trainable parameter: set requires_grad_(True) on some.")
    if hasattr(model, "_orig_mod"):
        raise Refused("the model is compiled: pass the module that was given to torch.compile.")
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise Refused(
            f"the model is wrapped in {wrapper}, which would reduce gradients by itself: pass the module "
            "inside; ranks share their clipped sums without it (docs/distributed.md)."
        )
    if not method.is_private:
        return
    for name, p in parameters.items():
        if p.is_complex():
            raise Refused(
                f"{name} holds complex numbers: keep it as pairs of real ones, [..., 2], and use "
                "torch.view_as_complex in the forward pass."
            )
    hooked = [n for n, p in parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise Refused(
            f"{listed(hooked)} has a gradient hook, which would see no per-example gradient: remove "
            "it, and change the private gradient with PrivateGradient.map instead."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise Refused(
                f"{name or 'the model'} is a BatchNorm in training mode, which lets one example move "
                "another's gradient: replace it by GroupNorm with model, report = dptrain.torch.convert("
                "model) (dptrain train --convert), or freeze it with .eval()."
            )


@contextlib.contextmanager
def parameters_untouched(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Refuse a forward pass that writes to a parameter, frozen or not: it could write data."""
    before = [(p, p._version) for p in parameters]
    yield
    if any(p._version != version for p, version in before):
        raise Refused(WRITTEN)


@contextlib.contextmanager
def precision_untouched(device: torch.device) -> Iterator[None]:
    """Refuse a backward pass that changes what float32 means to products, for norms rely on it."""
    before = is_full(device)
    yield
    if is_full(device) != before:
        raise Refused(
            "the backward pass of the model changes the precision of float32 products for everyone "
            "(torch.set_float32_matmul_precision): set it once, before training."
        )


def check_buffers(model: nn.Module, capture: Capture) -> None:
    """Refuse data in a buffer, however rarely the model writes it: the probe may not have seen it."""
    for name, buffer in model.named_buffers():
        if capture.holds_data(buffer):
            raise Refused(
                f"the buffer {name} of the model depends on the data, which would be released without any "
                "protection: freeze it, for example with .eval() on its module."
            )


def check_losses(losses: Any, batch_size: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,) or not losses.is_floating_point():
        what = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise Refused(
            f"loss_fn must return one loss per example, a float tensor of shape ({batch_size},), and "
            f"returned {what}: use reduction='none' and average over each example's own positions."
        )


def backward(capture: Capture, target: Tensor, parameters: dict[str, Tensor], retain_graph: bool) -> None:
    """Back-propagate to the anchor; the escape guard.

    Raises:
        Refused: a parameter reaches the loss by a way that was not recorded.
    """
    if not target.requires_grad:
        raise Refused("the losses depend on no trainable parameter of the model that was passed.")
    before = {name: (p.grad, None if p.grad is None else p.grad._version) for name, p in parameters.items()}
    capture.armed = True
    try:
        found = capture.differentiate(
            target, [capture.anchor, *parameters.values()], retain_graph=retain_graph, allow_unused=True
        )
    finally:
        capture.armed = False
    escaped = [name for name, gradient in zip(parameters, found[1:]) if gradient is not None]
    if escaped:
        raise Refused(
            f"{listed(escaped)} reaches the loss by a way that cannot be followed, for example through a "
            "custom torch.autograd.Function: compute it with ordinary operations or freeze it."
        )
    for name, p in parameters.items():
        grad, version = before[name]
        if p.grad is not grad or (grad is not None and grad._version != version):
            p.grad = None
            raise Refused(
                f"{name} received an ordinary gradient in the backward pass, as re-entrant checkpointing "
                "and reversible layers do: pass use_reentrant=False to torch.utils.checkpoint, or use layers "
                "that leave the backward pass to PyTorch."
            )


def listed(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
