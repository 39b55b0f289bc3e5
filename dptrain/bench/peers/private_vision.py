"""private_vision (https://github.com/woodyx218/private_vision): ghost and mixed ghost clipping.

Two backward passes; the first forms the norms in hooks. Parameters that it has no rule for must be frozen:
its guide and its script do so by name, here those are frozen that a first backward pass gives no norm.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dptrain.bench.contestant import Contestant
from dptrain.bench.peers.checkout import imported
from dptrain.bench.peers.training import (
    contestant_of,
    first,
    model_of,
    quiet,
)
from dptrain.bench.torch_task import Task
from dptrain.torch.sections import section

_library = imported("private_vision", "PRIVATE_VISION")
_hooks = importlib.import_module("private_vision.autograd_grad_sample")


def contestant(task: Task, mode: str) -> Contestant:
    """private_vision in the mode ``ghost`` or ``ghost_mixed``."""
    return contestant_of(f"private-vision {mode}", task, lambda noise: Training(task, mode, noise))


def refuses(error: Exception) -> bool:
    """Whether it is its word on shared parameters."""
    return isinstance(error, ValueError) and "does not support parameter sharing" in str(error)


class Training:
    """Its engine attached to the task's optimizer; it divides by L itself."""

    def __init__(self, task: Task, mode: str, noise_multiplier: float):
        self.task, self.mode = task, mode
        self.model = model_of(task)
        self._freeze_unknown()
        self.optimizer: Any = task.optimizer(self.model)
        self.engine = self._engine(self.optimizer, noise_multiplier)
        physical_step = self.engine._ghost_helper
        # Its `step` is a physical step and the end of a logical one; with the loss None it is the latter.
        self.engine._ghost_helper = lambda loss: (
            self._sums_to_grads() if loss is None else physical_step(loss)
        )

    def accumulate(self, batch: Any) -> None:
        with self._hooked():
            with section("forward"):
                losses = self.task.loss_fn(self.model, batch)
            with section("backward"):  # both passes, and the norms between them
                self.optimizer.virtual_step(loss=losses)

    def release(self) -> None:
        """``optimizer.step`` in its two parts."""
        with section("noise"):
            self.engine.step(loss=None)
        with section("optimizer step"):
            self.optimizer.original_step()
            self.engine.unlock()
            self.optimizer.zero_grad()

    def clipped_sums(self) -> dict[str, Tensor | None]:
        return {name: getattr(p, "summed_grad", None) for name, p in self.model.named_parameters()}

    def _engine(self, optimizer: Any, noise_multiplier: float) -> Any:
        size = self.task.logical_batch_size
        with self._hooked():  # it sets the mode as it is made
            engine = _library.PrivacyEngine(
                self.model,
                batch_size=size,
                sample_size=10 * size,
                epochs=1,
                noise_multiplier=noise_multiplier,
                max_grad_norm=self.task.clip_norm,
                record_snr=False,
                ghost_clipping=True,
                mixed=self.mode == "ghost_mixed",
            )
            engine.attach(optimizer)
        return engine

    def _freeze_unknown(self) -> None:
        """What its hooks give no norm, for two examples: batch normalisation may fail on one."""
        engine = self._engine(self.task.optimizer(self.model), 0.0)
        with self._hooked():
            self.task.loss_fn(self.model, first(self.task.batch, 2)).sum().backward()
        unknown = [p for _, p in engine.named_params if not hasattr(p, "norm_sample")]
        engine.detach()
        del self.model.privacy_engine
        for p in unknown:
            p.requires_grad_(False)

    def _sums_to_grads(self) -> None:
        for _, p in self.engine.named_params:
            p.grad = p.summed_grad
            del p.summed_grad

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """Its hooks in this mode, which is global, and as they were before afterwards."""
        _hooks.set_hooks_mode("ghost_norm_mixed" if self.mode == "ghost_mixed" else "ghost_norm")
        try:
            with quiet():
                yield
        finally:
            _hooks.set_hooks_mode("default")
