"""Other libraries, each by its own guide. Virtual steps as they do them; the noise once at the end."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from benchmarks.zoo.engines import Missing, found

from .contestants import LEARNING_RATE, Contestant, Task, Unsupported


def opacus(task: Task) -> Contestant:
    """Opacus's ``GradSampleModule`` and ``DPOptimizer``, as ``BatchMemoryManager`` drives them."""
    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        raise Unsupported(f"opacus cannot be imported ({error}): pip install opacus.") from error
    model = GradSampleModule(task.model(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=1.0,
        max_grad_norm=task.clip_norm,
        expected_batch_size=16 * task.batch_size,
        loss_reduction="sum",
    )

    def step() -> None:
        task.loss_fn(model, task.batch).sum().backward()
        optimizer.signal_skip_step(True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def end() -> None:  # the second half of `DPOptimizer.pre_step`, whose first ended the last batch
        optimizer.add_noise()
        optimizer.original_optimizer.step()
        optimizer._is_last_step_skipped = False
        optimizer.zero_grad(set_to_none=True)

    return Contestant("opacus", "peer", step, end)


def opacus_ghost(task: Task) -> Contestant:
    """Opacus's fast gradient clipping with ghost norms: two backward passes."""
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    except ImportError as error:
        raise Unsupported(f"opacus cannot be imported ({error}): pip install opacus.") from error
    model = GradSampleModuleFastGradientClipping(
        task.model(), max_grad_norm=task.clip_norm, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=1.0,
        max_grad_norm=task.clip_norm,
        expected_batch_size=16 * task.batch_size,
        loss_reduction="sum",
    )

    def step() -> None:
        losses = task.loss_fn(model, task.batch)
        DPTensorFastGradientClipping(model, optimizer, losses, "sum").backward()
        optimizer.signal_skip_step(True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def end() -> None:
        optimizer.add_noise()
        optimizer.original_optimizer.step()
        optimizer._is_last_step_skipped = False
        optimizer.zero_grad(set_to_none=True)

    return Contestant("opacus-ghost", "peer", step, end)


def fastdp(task: Task) -> Contestant:
    """FastDP, its checkout named by $FASTDP: mixed ghost norms and book-keeping, Abadi's clipping."""
    try:
        package = found("fastDP", "FASTDP")
    except Missing as error:
        raise Unsupported(str(error)) from error
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    with contextlib.redirect_stdout(io.StringIO()):  # it lists all layers
        engine: Any = package.PrivacyEngine(
            model,
            batch_size=16 * task.batch_size,
            sample_size=160 * task.batch_size,
            epochs=1,
            noise_multiplier=1.0,
            max_grad_norm=task.clip_norm,
            clipping_fn="Abadi",
            loss_reduction="sum",
        )
        engine.attach(optimizer)

    def step() -> None:
        task.loss_fn(model, task.batch).sum().backward()

    def end() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contestant("fastdp", "peer", step, end)


PEERS = {"opacus": opacus, "opacus-ghost": opacus_ghost, "fastdp": fastdp}
#: what the zoo, which judges exactness, calls them
ZOO_NAMES = {"opacus": "opacus-hooks", "opacus-ghost": "opacus-ghost", "fastdp": "fastdp"}
