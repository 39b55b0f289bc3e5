"""Ways to train a model: physical steps, and the end of a logical one.

Each has a model of its own with the same weights. A logical step is some calls of ``step`` on
physical batches and one of ``end``: noise, if there is any, and the optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

from .cases import Case, LossFn

LEARNING_RATE = 1e-4


class Unsupported(RuntimeError):
    """This way of training does not exist here; says why."""


@dataclass(frozen=True)
class Task:
    """What every contestant is given.

    Attributes:
        loss_fn: the case's, perhaps under autocast.
        batch: one physical batch, on the device.
        clip_norm: of the private ones.
    """

    case: Case
    loss_fn: LossFn
    batch: Any
    batch_size: int
    device: str
    clip_norm: float

    def model(self, channels_last: bool = False) -> nn.Module:
        model = self.case.build(self.device)
        return model.to(memory_format=torch.channels_last) if channels_last else model

    def examples(self, channels_last: bool = False) -> Any:
        def laid_out(t: Tensor) -> Tensor:
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

        return tree_map(laid_out, self.batch) if channels_last else self.batch


@dataclass
class Contestant:
    """One way of training.

    Attributes:
        step: a physical step; gradients are accumulated.
        end: the rest of a logical step.
        clipped_sum: for the private ones, by name, the sum over the examples of a mask ``[B]``.
        plan: what is to be said about how it is done, after the first step.
    """

    name: str
    kind: str  # "non-private", "dptrain" or "peer"
    step: Callable[[], None]
    end: Callable[[], None]
    clipped_sum: Callable[[Tensor], dict[str, Tensor]] | None = None
    plan: Callable[[], list[dict]] = list
    first_s: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0


def split(spec: str) -> tuple[str, set[str]]:
    """``auto+compiled+channels_last`` -> ``auto``, the two options."""
    name, *options = spec.split("+")
    unknown = set(options) - {"compiled", "graphs", "channels_last"}
    if unknown:
        raise ValueError(f"{spec}: the options of a contestant are compiled, graphs and channels_last.")
    return name, set(options)


def non_private(task: Task, spec: str) -> Contestant:
    """Ordinary training: ``kept``, whose .grad buffers stay, or ``fresh``, whose are made anew.

    Either accumulates over the physical batches of a logical one. ``+compiled`` is torch.compile,
    ``+graphs`` the same with CUDA graphs.
    """
    variant, options = split(spec)
    model = task.model("channels_last" in options)
    batch = task.examples("channels_last" in options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def total_loss(batch: Any) -> Tensor:
        return task.loss_fn(model, batch).sum()

    run = total_loss
    if options & {"compiled", "graphs"}:
        mode = "reduce-overhead" if "graphs" in options else None
        run = torch.compile(total_loss, dynamic=False, mode=mode)
    if variant == "kept":  # buffers of our own, also where a graph would hand out its memory
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    def step() -> None:
        run(batch).backward()

    def end() -> None:
        optimizer.step()
        if variant == "fresh":
            optimizer.zero_grad(set_to_none=True)
        else:
            torch._foreach_zero_([p.grad for p in model.parameters()])

    return Contestant(f"non-private {spec}", "non-private", step, end)


def private(task: Task, spec: str, memory_budget: int | None = None) -> Contestant:
    """dptrain by a method of its table; a memory budget, in bytes, is for ``auto``."""
    method, options = split(spec)
    if "graphs" in options:
        raise Unsupported("graphs are an option of non-private training; compiled covers dptrain's.")
    model = task.model("channels_last" in options)
    batch = task.examples("channels_last" in options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    mechanism = Mechanism.constant(
        noise_multiplier=1.0,
        clip_norm=task.clip_norm,
        sample_rate=0.1,
        steps=10_000,
        expected_batch_size=16 * task.batch_size,
    )
    wishes = {"compile": True} if "compiled" in options else {}
    if memory_budget is not None and method == "auto":
        wishes["memory_budget"] = memory_budget
    known = inspect.signature(dpt.clipped_grad).parameters
    for wish in wishes:
        if wish not in known:
            raise Unsupported(f"dptrain.torch.clipped_grad has no option {wish} yet.")
    clipped = dpt.clipped_grad(model, task.loss_fn, clip_norm=task.clip_norm, method=method, **wishes)
    key = Key.from_entropy()
    state: dict[str, Any] = {"sum": None, "step": 0}
    everyone = torch.ones(task.batch_size, dtype=torch.bool, device=task.device)

    def step() -> None:
        state["sum"] = clipped(batch, everyone, into=state["sum"])

    def end() -> None:
        gradient = dpt.privatize(state["sum"], mechanism, key.child(state["step"]), donate=True)
        dpt.apply(optimizer, model, gradient)
        state["sum"], state["step"] = None, state["step"] + 1

    def plan() -> list[dict]:
        if not clipped.method.is_private or not clipped.plans:
            return []
        return clipped.plan(batch, everyone).rows()

    return Contestant(spec, "dptrain", step, end, lambda mask: clipped(batch, mask).grads, plan)
