"""FastDP (https://github.com/awslabs/fast-differential-privacy): book-keeping in three modes.

With flat clipping by ``min(1, C / norm)`` (Abadi et al. 2016) in place of its automatic clipping, whose C is
1 whatever is asked for, and with origin parameters, without which it computes ordinary gradients besides.
It clips inside the backward pass, and adds the noise there in the first physical step of a logical one, so
that neither has a section of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.bench.contestant import Contestant
from dptrain.bench.peers.checkout import imported
from dptrain.bench.peers.training import (
    averaging,
    contestant_of,
    first,
    model_of,
    quiet,
)
from dptrain.bench.torch_task import Task
from dptrain.torch.sections import section

_library = imported("fastDP", "FASTDP")
_rules = _library.privacy_engine._supported_layers_norm_sample_AND_clipping


def contestant(task: Task, mode: str) -> Contestant:
    """FastDP with the clipping mode ``ghost``, ``MixGhostClip`` or ``MixOpt``."""
    return contestant_of(f"fastdp {mode}", task, lambda noise: Training(task, mode, noise))


def refuses(error: Exception) -> bool:
    """Never: it leaves out what it does not know, and says so on the way."""
    return False


class Training:
    """Its engine attached to the task's optimizer; ``backward`` clips and accumulates."""

    def __init__(self, task: Task, mode: str, noise_multiplier: float):
        self.task = task
        self.model = model_of(task)
        self.optimizer: Any = averaging(task, self.model)  # before the engine freezes all but the origins
        few = first(task.batch, 2)  # batch normalisation may fail on one
        origins = origin_params(self.model, tuple(_rules), lambda: task.loss_fn(self.model, few))
        size = task.logical_batch_size
        with quiet():  # it lists what it finds
            engine = _library.PrivacyEngine(
                self.model,
                batch_size=size,
                sample_size=10 * size,
                epochs=1,
                noise_multiplier=noise_multiplier,
                max_grad_norm=task.clip_norm,
                clipping_mode=mode,
                clipping_fn="Abadi",
                loss_reduction="sum",
                origin_params=origins,
            )
            engine.attach(self.optimizer)

    def accumulate(self, batch: Any) -> None:
        with section("forward"):
            loss = self.task.loss_fn(self.model, batch).sum()
        with section("backward"):
            loss.backward()

    def release(self) -> None:
        with section("optimizer step"), quiet():  # it names the parameters that it leaves out
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def clipped_sums(self) -> dict[str, Tensor | None]:
        return {name: getattr(p, "private_grad", None) for name, p in self.model.named_parameters()}


def origin_params(model: nn.Module, kinds: Collection[type], run: Callable[[], Any]) -> list[str]:
    """The parameters from which every layer's output can be reached, so that backward hooks run on all.

    FastDP turns ``requires_grad`` off for all parameters but these, and goes on to clip the gradients of all
    that had it on: ordinary gradients are computed for these alone ("ghost differentiation", Bu et al. 2023,
    appendix D.3, https://arxiv.org/abs/2210.00038). Its guide asks for the first layer's: a layer whose
    output does not hang on another's is one, and its bias costs least. GPT-2 has two, for words and
    positions.

    Args:
        kinds: of layers that it has rules for, exactly these types.
        run: a forward pass.

    Returns:
        Names. (It takes those of other parameters that contain one for origins too, which costs time alone.)
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    found: list[str] = []

    def own(layer: nn.Module) -> list[str]:
        both = getattr(layer, "bias", None), getattr(layer, "weight", None)
        return [names[p] for p in both if p in names]

    def mark(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if output.requires_grad:
            return None
        found.append(own(layer)[0])
        return output.detach().requires_grad_()

    layers = [layer for layer in model.modules() if type(layer) in kinds and own(layer)]
    hooks = [layer.register_forward_hook(mark) for layer in layers]
    for p in names:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            run()
    finally:
        for p in names:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return found
