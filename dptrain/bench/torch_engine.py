"""Contestants of PyTorch that are ours: ordinary training and dptrain's methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dptrain.torch as dpt
from dptrain.bench.contestant import Contestant, Unsupported, accounted
from dptrain.bench.torch_products import SameProducts
from dptrain.bench.torch_task import Task
from dptrain.core import methods
from dptrain.core.entropy import Key
from dptrain.torch import products
from dptrain.torch.ranks import all_ranks
from dptrain.torch.sections import section


def baselines(task: Task) -> dict[str, Callable[[], Contestant]]:
    """Ways of ordinary training by name, as functions that set them up: the best of them counts."""
    if not all_ranks().alone:
        return {"non-private DDP": lambda: data_parallel(task)}
    names = ["kept", "fresh"]
    if is_convolutional(task):  # most libraries' convolutions are faster where channels lie last
        names.append("kept, channels last")
    if task.case.compile:
        names += [f"{name}, compiled" for name in names if name.startswith("kept")]
        names += ["kept, compiled, layouts as given"] * is_convolutional(task)
        names += ["kept, graphs"] * task.case.device.startswith("cuda")
    elif task.case.device == "cpu" and task.case.precision == "fp32" and products.onednn_is_faster():
        names += [f"{name}, products as here" for name in names if name.startswith("kept")]
    return {f"non-private {name}": lambda name=name: non_private(task, name) for name in names}


def plain(task: Task) -> Contestant:
    """Ordinary training as most people do it, with the case's options."""
    if not all_ranks().alone:
        return data_parallel(task)
    return non_private(task, "kept, compiled" if task.case.compile else "kept")


def is_convolutional(task: Task) -> bool:
    """Whether there is more than the one convolution that cuts an image into patches."""
    return sum(isinstance(module, nn.Conv2d) for module in task.model().modules()) > 1


def non_private(task: Task, variant: str) -> Contestant:
    """Ordinary training: ``kept``, whose ``.grad`` buffers stay, or ``fresh``, whose are made anew.

    Either accumulates over the physical batches of a logical one and divides by its size once.
    ``compiled`` is torch.compile, ``graphs`` the same with CUDA graphs; ``layouts as given`` keeps it from
    laying images out with channels last, and ``products as here`` has its matrix products done as dptrain
    does its own.
    """
    if "channels last" in variant:
        task = Task(replace(task.case, channels_last=True))
    model, batch = task.model(), task.batch
    optimizer = task.optimizer(model)

    def total_loss(batch: Any) -> Tensor:
        return task.loss_fn(model, batch).sum()

    run = total_loss
    if "compiled" in variant or "graphs" in variant:
        mode = "reduce-overhead" if "graphs" in variant else None
        options = {"layout_optimization": False} if "layouts as given" in variant else None
        run = torch.compile(total_loss, dynamic=False, mode=mode, options=options)
    kept = variant.startswith("kept")
    how = SameProducts() if "products as here" in variant else contextlib.nullcontext()
    if kept:  # buffers of our own, also where a graph would hand out its memory
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    def step() -> None:
        with section("forward"), how:
            loss = run(batch)
        with section("backward"):
            loss.backward()
        task.synchronize()

    def end() -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        with section("optimizer step"):
            torch._foreach_div_(grads, task.logical_batch_size)
            optimizer.step()
        if kept:
            torch._foreach_zero_(grads)
        else:
            optimizer.zero_grad(set_to_none=True)
        task.synchronize()

    return Contestant(f"non-private {variant}", "baseline", step, end)


def data_parallel(task: Task) -> Contestant:
    """Ordinary training of all ranks by DistributedDataParallel at its best: it reduces once in a logical
    step, while the last backward pass goes on."""
    model, batch = task.model(), task.batch
    shared = DistributedDataParallel(model)
    optimizer = task.optimizer(model)
    total_loss = lambda: task.loss_fn(shared, batch).sum()  # noqa: E731
    if task.case.compile:
        total_loss = torch.compile(total_loss, dynamic=False)

    def step() -> None:
        with shared.no_sync():
            total_loss().backward()
        task.synchronize()

    def end() -> None:
        total_loss().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_div_(grads, task.logical_batch_size)  # a mean over ranks already
        optimizer.step()
        torch._foreach_zero_(grads)
        task.synchronize()

    return Contestant("non-private DDP", "baseline", step, end, ends_with_a_step=True)


def private(task: Task) -> Contestant:
    """dptrain by a method of its table."""
    case, model = task.case, task.model()
    optimizer = task.optimizer(model)
    mechanism = accounted(task)
    options: dict[str, Any] = {"compile": True} if case.compile else {}
    if case.budget_mib is not None:
        if methods.resolve(case.method).name != "auto":
            raise Unsupported("a memory budget is for the method auto.")
        options["memory_budget"] = round(case.budget_mib * 2**20)
    clipped = dpt.clipped_grad(model, task.loss_fn, clip_norm=task.clip_norm, method=case.method, **options)
    key, batch = Key.from_entropy(), task.batch
    everyone = torch.ones(case.batch_size, dtype=torch.bool, device=case.device)
    total: dpt.ClippedSum | None = None
    taken, together = 0, not all_ranks().alone

    def step() -> None:
        nonlocal total
        total = clipped(batch, everyone, into=total)
        task.synchronize()

    def end() -> None:
        nonlocal total, taken
        if together:
            total = clipped(batch, everyone, into=total, last=True)
        assert total is not None
        gradient = dpt.privatize(total, mechanism, key.child(taken), donate=True)
        dpt.apply(optimizer, model, gradient)
        total, taken = None, taken + 1
        task.synchronize()

    def clipped_sum(n: int) -> dict[str, Tensor]:
        mask = torch.arange(case.batch_size, device=case.device) < n
        return clipped(batch, mask).grads

    held_bytes = lambda: clipped.workspace_bytes  # noqa: E731
    return Contestant(
        f"torch {case.method}",
        "case",
        step,
        end,
        clipped_sum,
        held_bytes=held_bytes,
        ends_with_a_step=together,
    )
