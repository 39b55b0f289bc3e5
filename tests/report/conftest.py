"""A folder with records for every study."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from . import made_up

pytest.importorskip("pandas")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Figures 1 and 5 with failures, Table A4, and the simulation."""
    return fill(tmp_path / "results", ("fig1", "fig5", "table-a4", "simulation"))


def fill(folder: Path, names: tuple[str, ...]) -> Path:
    """Made-up numbers differ between studies, so each has records of its own."""
    for name in names:
        records = made_up.plausible()[name] + (made_up.failures() if name == "fig1" else [])
        own = [dataclasses.replace(r, id=f"{name}-{r.id}") for r in records]
        made_up.write_study(folder, name, own, **(made_up.curves() if name == "simulation" else {}))
    return folder
