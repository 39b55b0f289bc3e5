"""What a torch optimizer and its schedule remember, as tensors and JSON-able numbers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dptrain.training.checkpoint import CheckpointError

Tensors = dict[str, torch.Tensor]


def optimizer_state(optimizer: Optimizer, schedule: LRScheduler) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by "parameter index/name", everything else)."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    state = optimizer.state_dict()
    for index, own in state["state"].items():
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    rates = [group["lr"] for group in state["param_groups"]]
    return tensors, {"state": numbers, "rates": rates, "schedule": _plain(schedule.state_dict())}


def restore_optimizer(
    optimizer: Optimizer, schedule: LRScheduler, tensors: Tensors, numbers: dict[str, Any]
) -> None:
    """Give an optimizer of the same making what `optimizer_state` took.

    Raises:
        CheckpointError: it is of another one.
    """
    try:
        _restore(optimizer, schedule, tensors, numbers)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            "the optimizer's state in the checkpoint is of another one: resume with the settings and the "
            "versions that it was made with."
        ) from error


def _restore(optimizer: Optimizer, schedule: LRScheduler, tensors: Tensors, numbers: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers["state"]}.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    # As ``state_dict`` has them, which an optimizer that ranks share would have to bring together first.
    number = itertools.count()
    groups = [group | {"params": [next(number) for _ in group["params"]]} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule.load_state_dict(numbers["schedule"] | {"lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, numbers["rates"], strict=True):
        group["lr"] = rate


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without the functions that a schedule was made of."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}
