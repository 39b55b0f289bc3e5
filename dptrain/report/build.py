"""Everything that a folder of records comes to, written into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dptrain.report import studies, tables
from dptrain.report.draw import draw
from dptrain.report.errors import ReportError, needs, told_of
from dptrain.report.page import write_page
from dptrain.report.reading import read

FIGURES = ("png", "pdf")
TABLES = ("md", "csv", "tex")
PAGE = "html"
FORMATS = (*FIGURES, *TABLES, PAGE)


def build(folder: Path | str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``figures/NAME.png|pdf``, ``tables/NAME.md|csv|tex`` and ``report.html`` into the folder.

    Args:
        folder: with ``records/`` and perhaps ``studies/``, as docs/records.md describes.
        formats: of `FORMATS`.

    Returns:
        The files that were written.

    Raises:
        ReportError: a format is unknown, the folder has no records, a record is damaged, or a library
            of the extra ``report`` is missing.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ReportError(f"There is no format {unknown[0]!r}; choose from {', '.join(FORMATS)}.")
    for library in ("pandas", *(("jinja2",) if {"tex", PAGE} & {*formats} else ())):
        needs(library)
    if PAGE in formats:
        needs("plotly")
    found = read(folder)
    shown = [studies.show(study) for study in studies.in_order(found.studies)]
    written: list[Path] = []
    for one in shown:
        with told_of(f"The study {one.name}"):
            for path in _paths(found.path / "tables", one.name, [f for f in formats if f in TABLES]):
                tables.write(one, path)
                written.append(path)
            if one.panels and (chosen := [f for f in formats if f in FIGURES]):
                figures = _paths(found.path / "figures", one.name, chosen)
                draw(one, figures)
                written += figures
    if PAGE in formats:
        with told_of("The page"):
            written.append(write_page(found, shown, found.path / "report.html"))
    return written


def _paths(folder: Path, name: str, suffixes: Sequence[str]) -> list[Path]:
    if suffixes:
        folder.mkdir(parents=True, exist_ok=True)
    return [folder / f"{name}.{suffix}" for suffix in suffixes]
