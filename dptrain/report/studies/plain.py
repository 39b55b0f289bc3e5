"""Records that belong to no study of the paper, by measure."""

from __future__ import annotations

from collections.abc import Callable

from dptrain.report import quantities as q
from dptrain.report.reading import Study
from dptrain.report.shown import Axis, Chart, Shown
from dptrain.report.studies.accuracy import ACCURACY
from dptrain.report.studies.common import common_note, lines, over_models, ranking, table
from dptrain.report.studies.cost import RATIO, THROUGHPUT
from dptrain.report.studies.memory import BATCH, dp_memory
from dptrain.report.studies.precision import fig_a1
from dptrain.report.studies.scaling import fig8
from dptrain.report.studies.sections import dp_runtime_profile


def throughput(study: Study) -> Shown:
    """Over the physical batch where it varies, else over models."""
    ok = study.ok()
    axis = Axis("throughput relative to non-private")
    reference = (1.0, "non-private")
    title = "Speed relative to non-private"
    sizes = {r.case["batch_size"] for r in ok}
    if len(sizes) > 1 and len({r.model for r in ok}) == 1:
        over = Axis("physical batch size (examples)", log=True)
        made = lines(ok, lambda r: r.case["batch_size"], q.ratio, q.ratio_interval)
        charts: tuple[Chart, ...] = (Chart("line", title, over, axis, made, reference),)
    else:
        charts = over_models(ok, title, axis, q.ratio, q.ratio_interval, reference)
    values = {**THROUGHPUT, **RATIO}
    return Shown(study.name, study.title, study.shows, table(study, values), charts, (), common_note(study))


def batch_size(study: Study) -> Shown:
    """The largest physical batches."""
    charts = over_models(
        study.ok(),
        "Largest physical batch",
        Axis("largest physical batch (examples)", log=True),
        lambda r: q.largest(r) or None,  # of 0 there is no logarithm
    )
    found = table(study, BATCH, never=("Physical batch",))
    return Shown(study.name, study.title, study.shows, found, charts, (), common_note(study))


def accuracy(study: Study) -> Shown:
    """Test accuracies."""
    chart = ranking(study.ok(), "Test accuracy", Axis("test accuracy"), q.accuracy, q.accuracy_interval)
    found = table(study, ACCURACY)
    return Shown(study.name, study.title, study.shows, found, (chart,), (), common_note(study))


def _without_findings(show: Callable[[Study], Shown]) -> Callable[[Study], Shown]:
    def shown(study: Study) -> Shown:
        made = show(study)
        return Shown(made.name, made.title, made.shows, made.table, made.charts, (), common_note(study))

    return shown


#: what shows the records of a measure
BY_MEASURE: dict[str, Callable[[Study], Shown]] = {
    "throughput": throughput,
    "batch-size": batch_size,
    "memory": _without_findings(dp_memory),
    "profile": _without_findings(dp_runtime_profile),
    "compile": _without_findings(fig_a1),
    "scaling": _without_findings(fig8),
    "accuracy": accuracy,
}
