"""Engines that are judged: each gives the clipped sum of one batch the way its own guide says.

All clip flatly with ``min(1, C / norm)`` (Abadi et al. 2016); a peer that documents a small constant
beside the norm is compared with that formula. No noise is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from .entry import Case, Wide, has_batch_norm
from .verdict import TOLERANCE, Answer

#: a peer may form its norms in float32
PEER_TOLERANCE = 1e-6
#: both Opacus and the two engines of Bu et al. divide by the norm plus this
STABILISER = 1e-6


class Missing(RuntimeError):
    """The engine cannot be imported here."""


@dataclass(frozen=True)
class Engine:
    """``clipped_sum(case, batch, clip_norm)``; ``prepare`` may convert a model as the guide advises."""

    clipped_sum: Callable[..., Answer]
    packages: tuple[str, ...]
    refusals: Callable[[], tuple[type[Exception], ...]] = tuple
    prepare: Callable[[Case], Case] = lambda case: case
    tolerance: float = PEER_TOLERANCE

    def is_refusal(self, error: Exception) -> bool:
        return isinstance(error, self.refusals())

    def versions(self) -> dict[str, str]:
        return {name: version_of(name) for name in ("torch", "timm", "transformers", "peft", *self.packages)}


def version_of(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return getattr(importlib.import_module(package), "__version__", "unknown")


# ---------------------------------------------------------------- dptrain


def dptrain(method: str = "auto") -> Engine:
    import dptrain.torch as dpt

    def clipped_sum(case: Case, batch, clip_norm: float) -> Answer:
        out = dpt.clipped_grad(case.model, case.loss_fn, clip_norm=clip_norm, method=method)(batch)
        return Answer(out.grads, out.norms)

    return Engine(clipped_sum, ("dptrain",), lambda: (dpt.Refused,), tolerance=TOLERANCE)


# ---------------------------------------------------------------- Opacus


def opacus(mode: str) -> Engine:
    """``PrivacyEngine.make_private`` without its data loader: validate, wrap, clip."""
    try:
        from opacus.grad_sample.utils import prepare_module
        from opacus.optimizers import get_optimizer_class
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
        from opacus.validators import ModuleValidator
        from opacus.validators.errors import UnsupportedError
    except ImportError as error:
        raise Missing(f"opacus cannot be imported ({error}): pip install opacus.") from error

    def prepare(case: Case) -> Case:
        """Opacus's own layers in place of LSTM or attention; BatchNorm is left for it to refuse."""
        if ModuleValidator.is_valid(case.model) or has_batch_norm(case.model):
            return case
        try:
            return dataclasses.replace(case, model=ModuleValidator.fix(case.model).double().train())
        except Exception:  # it says so itself when it is asked to clip
            return case

    def clipped_sum(case: Case, batch, clip_norm: float) -> Answer:
        ModuleValidator.validate(case.model, strict=True)
        options = {"max_grad_norm": clip_norm} if mode == "ghost" else {}
        wrapped = prepare_module(
            case.model, grad_sample_mode=mode, batch_first=True, loss_reduction="sum", **options
        )
        optimizer = get_optimizer_class(clipping="flat", distributed=False, grad_sample_mode=mode)(
            torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        losses = case.loss_fn(wrapped, batch)
        if mode == "ghost":
            DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
            grads = {n: p.grad for n, p in case.model.named_parameters()}
        else:
            losses.sum().backward()
            optimizer.clip_and_accumulate()
            grads = {n: getattr(p, "summed_grad", None) for n, p in case.model.named_parameters()}
        return Answer(grads, stabiliser=STABILISER)

    return Engine(spared(clipped_sum), ("opacus",), lambda: (UnsupportedError, NotImplementedError), prepare)


# ---------------------------------------------------------------- FastDP and private_vision


def found(package: str, variable: str):
    """Import a package from the checkout that an environment variable names."""
    path = os.environ.get(variable)
    if path and path not in sys.path:
        sys.path.insert(0, path)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{package} cannot be imported ({error}): name its checkout in {variable}.") from error


def fastdp() -> Engine:
    """https://github.com/awslabs/fast-differential-privacy, hook-based, with Abadi's clipping."""
    package = found("fastDP", "FASTDP")

    def clipped_sum(case: Case, batch, clip_norm: float) -> Answer:
        trainable = [p for p in case.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.0)
        engine = package.PrivacyEngine(
            case.model,
            batch_size=1,  # the sum is divided by it
            sample_size=1000,
            epochs=1,
            noise_multiplier=0.0,
            max_grad_norm=clip_norm,
            clipping_fn="Abadi",
            loss_reduction="sum",
        )
        engine.attach(optimizer)
        case.loss_fn(case.model, batch).sum().backward()
        optimizer.step()
        return Answer({n: p.grad for n, p in case.model.named_parameters()}, stabiliser=STABILISER)

    return Engine(spared(clipped_sum), ("fastDP",))


def private_vision() -> Engine:
    """https://github.com/woodyx218/private_vision, mixed ghost clipping."""
    package = found("private_vision", "PRIVATE_VISION")
    hooks = importlib.import_module("private_vision.autograd_grad_sample")

    def clipped_sum(case: Case, batch, clip_norm: float) -> Answer:
        try:
            trainable = [p for p in case.model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trainable, lr=0.0)
            engine = package.PrivacyEngine(
                case.model,
                batch_size=1,  # the sum is divided by it
                sample_size=1000,
                epochs=1,
                noise_multiplier=0.0,
                max_grad_norm=clip_norm,
            )
            engine.attach(optimizer)
            optimizer.step(loss=case.loss_fn(case.model, batch))
        finally:  # the mode of its hooks is global
            hooks.set_hooks_mode("default")
        return Answer({n: p.grad for n, p in case.model.named_parameters()}, stabiliser=STABILISER)

    return Engine(spared(clipped_sum), ("private_vision",))


def spared(clipped_sum):
    """What is done to a peer's best advantage.

    Activations in place are not what is judged; layers that it runs a second time must not lose
    precision either; and some print as they go.
    """

    def best(case: Case, *args) -> Answer:
        for module in case.model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False
        with Wide() if case.wide else contextlib.nullcontext(), contextlib.redirect_stdout(io.StringIO()):
            return clipped_sum(case, *args)

    return best


ENGINES: dict[str, Callable[[], Engine]] = {
    "dptrain": dptrain,
    "opacus-hooks": lambda: opacus("hooks"),
    "opacus-functorch": lambda: opacus("functorch"),
    "opacus-ghost": lambda: opacus("ghost"),
    "fastdp": fastdp,
    "private_vision": private_vision,
}


def engine_named(name: str) -> Engine:
    """An engine by name; ``dptrain:METHOD`` for a method of dptrain's table."""
    if name.startswith("dptrain:"):
        return dptrain(name.split(":")[1])
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)} or dptrain:METHOD.")
    return ENGINES[name]()
