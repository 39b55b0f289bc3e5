"""A pure function for each study: its records in, what it shows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dptrain.report.errors import told_of
from dptrain.report.reading import Study
from dptrain.report.shown import Shown
from dptrain.report.studies import (
    accuracy,
    compression,
    cost,
    memory,
    optimizers,
    plain,
    precision,
    scaling,
    sections,
    support,
)
from dptrain.report.studies.common import common_note, table

STUDIES: dict[str, Callable[[Study], Shown]] = {
    "fig1": cost.fig1,
    "fig2": memory.fig2,
    "fig3": cost.fig3,
    "fig4": cost.fig4,
    "fig5": cost.fig5,
    "fig6": cost.fig6,
    "fig7": precision.fig7,
    "fig8": scaling.fig8,
    "fig-a1": precision.fig_a1,
    "fig-a2": scaling.fig_a2,
    "fig-a3": scaling.fig8,
    "fig-a4": scaling.fig_a4,
    "table1": memory.table1,
    "table2": memory.table2,
    "table-a1": support.table_a1,
    "table-a2": support.table_a2,
    "table-a3": sections.table_a3,
    "table-a4": accuracy.table_a4,
    "batch-size-accuracy": accuracy.batch_size_accuracy,
    "tf32-steps": precision.tf32_steps,
    "loader-workers": support.loader_workers,
    "dp-timing": sections.dp_timing,
    "dp-runtime-profile": sections.dp_runtime_profile,
    "dp-memory": memory.dp_memory,
    "naive-momentum": compression.naive_momentum,
    "public-compress": compression.public_compress,
    "simulation": scaling.simulation,
    "optimizers": optimizers.optimizers,
}


def show(study: Study) -> Shown:
    """What a study comes to. One that is not known is shown as a table of its cases.

    Never raises for a record of any status, nor for none.

    Raises:
        ReportError: a record holds values of another kind than it should; says which if one does it alone.
    """
    try:
        return _shown(study)
    except MemoryError:
        raise
    except Exception:
        with told_of(f"The study {study.name}" + _culprit(study)):
            raise


def _culprit(study: Study) -> str:
    """The first record that cannot be shown alone."""
    for record in study.records:
        try:
            _shown(dataclasses.replace(study, records=(record,)))
        except Exception:
            return f" with its record {record.id}"
    return ""


def _shown(study: Study) -> Shown:
    if study.name in STUDIES:
        return STUDIES[study.name](study)
    measures = {record.measure for record in study.records}
    if len(measures) == 1 and (known := plain.BY_MEASURE.get(measures.pop())):
        return known(study)
    return Shown(study.name, study.title, study.shows, table(study, {}), (), (), common_note(study))


def in_order(studies: tuple[Study, ...]) -> tuple[Study, ...]:
    """The paper's order, then the others as they come."""
    order = list(STUDIES)
    rank = {name: place for place, name in enumerate(order)}
    return tuple(sorted(studies, key=lambda study: rank.get(study.name, len(order))))
