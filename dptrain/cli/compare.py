"""`dptrain bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.table import Table

from dptrain.cli.terminal import Terminal


def compare(a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Show what became faster or slower from one record, or one folder of records, to another.

    Args:
        a: A record or a folder, before.
        b: The same, after.
    """
    from dptrain.report import compare_paths

    found = compare_paths(a, b)
    console, table = Terminal(), Table()
    for name in found.columns:
        table.add_column(str(name))
    for row in found.itertuples(index=False):
        table.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    console.print(table)
    for warning in found.attrs.get("warnings", ()):
        console.print(f"[yellow]note:[/] {escape(warning)}")
    return 0
