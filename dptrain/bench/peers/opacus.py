"""Opacus (https://github.com/meta-pytorch/opacus): hooks, functorch, and ghost clipping.

Its modes compute per-example gradients layer by layer with rules for each kind (``hooks``) or with functorch
(``functorch``), or form their norms alone and go backward a second time (``ghost``). Virtual steps are those
of its ``BatchMemoryManager``; its data loader is not used.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import opacus
from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedError
from torch import Tensor

from dptrain.bench.contestant import Contestant
from dptrain.bench.peers.training import averaging, contestant_of, model_of
from dptrain.bench.torch_task import Task
from dptrain.torch.sections import section

_FOLDER = Path(opacus.__file__).parent


def contestant(task: Task, mode: str) -> Contestant:
    """Opacus in the mode ``hooks``, ``functorch`` or ``ghost``."""
    return contestant_of(f"opacus {mode}", task, lambda noise: Training(task, mode, noise))


def refuses(error: Exception) -> bool:
    """Whether it is Opacus's word for a module that it does not do.

    PyTorch raises NotImplementedError as well, for an operation that a device lacks.
    """
    if isinstance(error, NotImplementedError):
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        return Path(place).is_relative_to(_FOLDER) and "aten::" not in str(error)
    return isinstance(error, UnsupportedError)


class Training:
    """``PrivacyEngine.make_private`` without its data loader: validate, wrap, clip."""

    def __init__(self, task: Task, mode: str, noise_multiplier: float):
        self.task, self.mode = task, mode
        self.model = model_of(task)
        ModuleValidator.validate(self.model, strict=True)
        options = {"max_grad_norm": task.clip_norm} if mode == "ghost" else {}
        self.wrapped: Any = prepare_module(
            self.model, grad_sample_mode=mode, batch_first=True, loss_reduction="sum", **options
        )
        self.optimizer: Any = get_optimizer_class(clipping="flat", distributed=False, grad_sample_mode=mode)(
            averaging(task, self.model),
            noise_multiplier=noise_multiplier,
            max_grad_norm=task.clip_norm,
            expected_batch_size=task.logical_batch_size,
            loss_reduction="sum",
        )

    def accumulate(self, batch: Any) -> None:
        with section("forward"):
            losses = self.task.loss_fn(self.wrapped, batch)
        with section("backward"):  # both passes of ghost clipping, and the norms between them
            if self.mode == "ghost":
                DPTensorFastGradientClipping(self.wrapped, self.optimizer, losses, "sum").backward()
            else:
                losses.sum().backward()
        with section("clip and accumulate"):
            self.optimizer.signal_skip_step(True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """The second half of ``DPOptimizer.step``, whose first half ended the last physical step."""
        with section("noise"):
            self.optimizer.add_noise()
        with section("optimizer step"):
            self.optimizer.original_optimizer.step()
            self.optimizer._is_last_step_skipped = False
            self.optimizer.zero_grad(set_to_none=True)

    def clipped_sums(self) -> dict[str, Tensor | None]:
        return {name: getattr(p, "summed_grad", None) for name, p in self.model.named_parameters()}
