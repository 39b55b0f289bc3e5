"""`dptrain report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.report import FORMATS, build

__all__ = ["BAD_INPUT_ERRORS", "run"]


def run(arguments: Sequence[str]) -> int:
    """Write tables, figures and a page from records."""
    return tyro.cli(_report, prog="dptrain report", args=list(arguments))


def _report(folder: Annotated[Path, tyro.conf.Positional], /, formats: tuple[str, ...] = FORMATS) -> int:
    """Write tables, figures and one self-contained page from a folder of records.

    Args:
        folder: What `dptrain bench` or `dptrain reproduce` wrote.
        formats: Of png, pdf, md, csv, tex and html.
    """
    console = Terminal()
    with Terminal(stderr=True).status("Drawing ..."):
        written = build(folder, formats)
    for path in written:
        console.print(escape(str(path)), highlight=False, soft_wrap=True)
    return 0
