"""`dptrain bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from rich.markup import escape
from rich.table import Table

from dptrain.bench import MEASURES, Case, grid
from dptrain.bench.case import Measure
from dptrain.bench.engines import OURS
from dptrain.bench.peers import PEERS
from dptrain.cli.bench_display import show_records, watched
from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.core import methods

__all__ = ["BAD_INPUT_ERRORS", "run"]

SOME_FAILED = 1
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


def run(arguments: Sequence[str]) -> int:
    """Measure, list what can be measured, or compare records. Returns 1 if a case ended in an error."""
    given = list(arguments)
    if given == ["--list"]:
        return _list()
    if given[:1] == ["compare"]:
        from dptrain.cli.compare import compare

        return tyro.cli(compare, prog="dptrain bench compare", args=given[1:])
    return tyro.cli(_bench, prog="dptrain bench", args=given, config=(tyro.conf.FlagCreatePairsOff,))


def _bench(
    measure: Annotated[Measure, tyro.conf.Positional],
    /,
    method: tuple[str, ...] = ("auto",),
    engine: str = "torch",
    model: tuple[str, ...] = ("vit-tiny",),
    image_size: tuple[int, ...] = (224,),
    batch_size: tuple[int, ...] = (16,),
    precision: tuple[Precision, ...] = ("fp32",),
    compile: bool = False,
    channels_last: bool = False,
    device: str = "cpu",
    devices: tuple[int, ...] = (1,),
    accumulate: int = 16,
    memory_gib: float | None = None,
    budget_mib: float | None = None,
    seconds: float = 20.0,
    seeds: int = 3,
    set: tuple[str, ...] = (),
    num_classes: int = 100,
    out: Path = Path("bench"),
) -> int:
    """Measure ways of training: ours, ordinary training and other libraries.

    Options that take several values make a grid. Each case runs in a process of its own, with ordinary
    training beside it, and leaves a record; what has a record is not measured again. `dptrain bench --list`
    shows the measures and the methods of each engine, `dptrain bench compare A B` two records or folders.

    Args:
        measure: throughput, batch-size, memory, profile, compile, scaling or accuracy.
        method: Methods by any of their names, each perhaps with an engine: auto jax:auto opacus:O-flat.
        engine: Of the methods that name none.
        model: As for `dptrain train`, or gpt2-like.
        image_size: Pixels along a side; tokens for gpt2-like.
        batch_size: Physical batch sizes; where batch-size begins to look.
        precision: Compute types.
        compile: Ours and ordinary training with torch.compile.
        channels_last: Memory layout of images and convolutions.
        device: cpu, cuda, cuda:1.
        devices: Numbers of devices.
        accumulate: Physical batches in a logical one.
        memory_gib: For batch-size: the memory that there is.
        budget_mib: For the method auto: scratch memory.
        seconds: Limit of the timed part of a case, at which it ends after five rounds at least.
        seeds: For accuracy: runs.
        set: For accuracy: settings of `dptrain train`, name=value.
        num_classes: Of the head.
        out: The folder for records and traces.
    """
    base = Case(
        measure=measure,
        compile=compile,
        channels_last=channels_last,
        device=device,
        accumulate=accumulate,
        memory_gib=memory_gib,
        budget_mib=budget_mib,
        seconds=seconds,
        seeds=seeds if measure == "accuracy" else 1,
        settings=tuple(_setting(text) for text in set),
        num_classes=num_classes,
    )
    cases = [
        case
        for name in method
        for case in grid(
            base,
            engine=[_engine_of(name, engine)],
            method=[name.rpartition(":")[2]],
            model=model,
            image_size=image_size,
            precision=precision,
            devices=devices,
            batch_size=batch_size,
        )
    ]
    console = Terminal()
    records = watched(console, cases, out)
    show_records(console, records)
    console.print(escape(f"records: {out / 'records'}"), highlight=False)
    return SOME_FAILED if any(record.status == "error" for record in records) else 0


def _engine_of(method: str, otherwise: str) -> str:
    return method.rpartition(":")[0] or otherwise


def _setting(text: str) -> tuple[str, object]:
    """`name=value`, the value as JSON where it is such."""
    import json

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes name=value, and {text!r} is none.")
    try:
        known = json.loads(value)
    except ValueError:
        known = value
    return name.replace("-", "_"), value if isinstance(known, list | dict) else known


def _list() -> int:
    console = Terminal()
    table = Table(title="measures", title_justify="left")
    table.add_column("measure")
    table.add_column("what it gives")
    for name in get_args(Measure):
        table.add_row(name, MEASURES[name])
    console.print(table)
    table = Table(title="methods", title_justify="left")
    table.add_column("engine")
    table.add_column("method")
    table.add_column("also called")
    for engine in OURS:
        for row in methods.TABLE:
            table.add_row(engine, row.name, ", ".join(row.aliases))
    for name, peer in PEERS.items():
        table.add_row(name, "non-private", "")
        for mode in dict.fromkeys(peer.methods.values()):
            first, *others = [m for m, its in peer.methods.items() if its == mode]
            table.add_row(name, first, ", ".join(others))
    console.print(table)
    return 0
