"""`dptrain check MODEL`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.markup import escape
from torch.utils._pytree import tree_map

from dptrain.cli.check_display import show
from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.models import select_trainable
from dptrain.models.subjects import Choices, subject
from dptrain.torch import CheckReport, check
from dptrain.torch.device_memory import total_memory
from dptrain.training.device import resolve_device

__all__ = ["BAD_INPUT_ERRORS", "run"]

NOT_EXACT = 1
WIDTH = 100
"""Of the output where there is no terminal to say it."""
PARTS = {
    "plan": "Running the model on stand-in examples to see where they lie and that they do not mix ...",
    "exactness": "Comparing the plan with single examples in float64 ...",
    "memory": "Measuring the memory of two small batches ...",
}
UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def run(arguments: Sequence[str]) -> int:
    """Check one model. Returns 0 if it is exact, else 1."""
    return tyro.cli(
        _check, prog="dptrain check", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )


def _check(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    method: str = "auto",
    trainable: str = "all",
    batch_size: int = 2,
    image_size: int | None = None,
    length: int | None = None,
    num_classes: int = 10,
    task: Literal["classification", "lm", "seq2seq"] | None = None,
    config: tuple[str, ...] = (),
    weights: Path | None = None,
    convert: bool = False,
    allow_unused: bool = False,
    memory: str | None = None,
    device: str = "auto",
    all_uses: Annotated[bool, tyro.conf.arg(name="all")] = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Show how a model would be clipped, and whether that is exact.

    Prints every use of a parameter, the coverage of the parameters, whether examples mix, the largest
    errors in float64 against single examples, the largest physical batch, and a verdict. The exit
    status is 0 only if the model is exact, 1 if it is refused or wrong, and 2 for bad input.

    Args:
        model: A small network, a model of the paper or of timm (vit-tiny, convnext_tiny); a model
            type, a class, a folder or a config.json of transformers (bert, GPT2LMHeadModel); or
            package.module:factory, which returns a model for images or (model, loss_fn, batch).
        method: A clipping method that plans uses.
        trainable: all, head, bias, norm, or a regular expression for parameter names.
        batch_size: Examples to run the check on.
        image_size: Pixels; by default the model's own size.
        length: Tokens; the other examples of a batch are shorter and padded. By default 64.
        num_classes: Classes of a classification.
        task: What a model of transformers is for; by default what its type is mostly used for.
        config: Settings of a transformers configuration, key=value.
        weights: A safetensors file; by default weights are random.
        convert: Put GroupNorm in the place of BatchNorm first.
        allow_unused: Accept trainable parameters that take no part in the loss.
        memory: Budget for the largest physical batch, such as 16GB; by default the device's memory.
        device: cuda, cpu, ..., or auto.
        all_uses: Show each use, instead of repeated layers as one.
        as_json: Print one JSON object instead.
    """
    budget = None if memory is None else _bytes(memory)
    where = resolve_device(device)
    room = _free_memory() if where.type == "cpu" else total_memory(where)
    choices = Choices(batch_size, num_classes, image_size, length, task, config, weights, room)
    wide_enough = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    console, notes = Terminal(width=wide_enough), []
    with Terminal(stderr=True).status(escape(f"Building {model} ...")) as status:
        chosen = subject(model, choices)
        network = chosen.model
        if convert:
            from dptrain.torch.convert import convert as converted

            network, conversion = converted(network, in_place=True)
            notes.append(str(conversion).splitlines()[0] + ".")
        if trainable != "all":
            select_trainable(network, trainable)
        network.to(where)
        batch = tree_map(lambda t: t.to(where) if isinstance(t, torch.Tensor) else t, chosen.batch)
        report = check(
            network,
            chosen.loss_fn,
            batch,
            method=method,
            allow_unused=allow_unused,
            memory_bytes=budget,
            progress=lambda part: status.update(PARTS[part]),
        )
    if as_json:
        print(json.dumps(_record(chosen.description, notes, report), indent=2))
    else:
        show(console, chosen.description, notes, report, all_uses)
    return 0 if report.exact else NOT_EXACT


def _record(description: str, notes: list[str], report: CheckReport) -> dict[str, object]:
    return {"subject": description, "notes": notes, **report.to_dict()}


def _bytes(text: str) -> int:
    """`16GB`, `16GiB` or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--memory takes a size such as 16GB, and {text!r} is none.")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _free_memory() -> int:
    """Bytes that this machine has left, as far as it says."""
    whole = total_memory(torch.device("cpu"))
    try:
        return min(whole, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return whole
