"""Momenta and compression of private gradients: accuracy over epochs, against epsilon and against bytes
sent."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dptrain.report import intervals
from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies.accuracy import SAME
from dptrain.report.studies.common import common_note, finding, percent, table

MB = 1e6

#: by (how it is compressed and clipped, before clipping, whether it is private): name and look of a variant
_COMPRESSED: dict[tuple[str, bool, bool], tuple[str, Look]] = {
    ("none", False, True): ("gauss_sgd", Look("auto")),
    ("topk", False, True): ("gauss_sgd_topk", Look("per-example", marker="triangle")),
    ("topk", False, False): ("vanilla_topk", Look("non-private", "dash", "square")),
    ("public-topk", False, True): ("public_aid_topk (mask after noise)", Look("ghost", marker="diamond")),
    ("public-topk", True, True): ("public mask before clipping", Look("bk-ghost", marker="pentagon")),
    ("public-topk, shorter", True, True): (
        "public mask before clipping, C / 4",
        Look("bk-mix-opt", marker="pentagon"),
    ),
    ("leaky-topk-no-guarantee", False, True): ("leaky (NO guarantee)", Look("fast-gradient", "dot", "cross")),
}
_MOMENTA: dict[str, tuple[str, str]] = {
    "sgd": ("private SGD", "per-example"),
    "accumulated-momentum": ("accumulated momentum", "ghost"),
    "running-momentum": ("running-average momentum", "bk-ghost"),
    "momentum": ("momentum", "auto"),
}


def naive_momentum(study: Study) -> Shown:
    """What momentum makes of private gradients, whole and compressed."""
    judges = (_momentum_helps, _top_k_costs)
    return _shown(study, "Optimizer", _optimizer, _optimizer_look, judges)


def public_compress(study: Study) -> Shown:
    """What compression costs, and what public data are worth to it."""
    judges = (_noisy_mask_costs, _public_helps, _before_is_better, _leak_looks_better)
    return _shown(study, "Variant", _variant, _variant_look, judges)


def _shown(
    study: Study,
    column: str,
    name: Callable[[Record], str],
    look: Callable[[Record], Look],
    judges: Sequence[Callable[[Study], Finding]],
) -> Shown:
    values = {
        "Epsilon": epsilon,
        "Test accuracy": q.accuracy,
        "95 % from": lambda r: (q.accuracy_interval(r) or (None, None))[0],
        "95 % to": lambda r: (q.accuracy_interval(r) or (None, None))[1],
        "Bytes per step, noisy gradient": lambda r: q.result(r, "bytes_per_step", "release_bytes"),
        "Bytes per step, sum": lambda r: q.result(r, "bytes_per_step", "sum_bytes"),
        "Sent in all (MB)": _sent,
        "Runs": lambda r: len(q.samples(r.results.get("accuracies"))) or None,
    }
    found = table(study, values, ("Model",), never=("Method",), also={column: name})
    found = found[[column, *(c for c in found.columns if c != column)]]
    ok = [r for r in study.ok() if _curves(r)]
    y = Axis("test accuracy")
    panels = (
        ("Accuracy over epochs", Axis("expected epochs"), lambda r, p: p.get("epochs")),
        ("Accuracy against epsilon", Axis("epsilon"), _epsilon_so_far),
        (
            "Accuracy against bytes sent",
            Axis("noisy gradients of a device, MB", log=True),
            lambda r, p: _megabytes(r, p.get("step")),
        ),
    )
    charts = tuple(
        Chart(
            "line",
            title,
            x,
            y,
            tuple(s for r in ok if (s := _line(r, f"{name(r)}, ε = {epsilon(r)}", look(r), get)).x),
        )
        for title, x, get in panels
    )
    notes = [*common_note(study)]
    if ok:
        notes.append(
            "Those with ε = ∞ have no guarantee, and no place in the panel over epsilon. Bytes are those "
            "that noisy gradients take: kept values, and their indices where nobody else knows them."
        )
    findings = tuple(judge(study) for judge in judges)
    return Shown(study.name, study.title, study.shows, found, charts, findings, tuple(notes))


def guarded(record: Record) -> bool:
    """Whether its epsilon is finite."""
    return record.results.get("guarantee") is True


def epsilon(record: Record) -> str | None:
    """What was spent, for people: the largest of all runs, ∞ without a guarantee."""
    spent = q.samples(record.results.get("epsilons"))
    if record.results.get("guarantee") is False:
        return "∞"
    return f"{max(spent):.3g}" if spent else None


def _curves(record: Record) -> list[list[Mapping[str, Any]]]:
    """Points of each run, of all runs the same steps."""
    found = record.results.get("curves")
    return [list(run) for run in found] if isinstance(found, list) and all(found) else []


def _line(record: Record, name: str, look: Look, x: Callable[[Record, Mapping[str, Any]], Any]) -> Series:
    """Mean accuracies over runs at the places `x`."""
    places, means, bounds = [], [], []
    for points in zip(*_curves(record)):
        place = q.number(x(record, points[0]))
        accuracies = q.samples([p.get("accuracy") for p in points])
        if place is not None and accuracies:
            places.append(place)
            means.append(statistics.fmean(accuracies))
            bounds.append(intervals.of_mean(accuracies) if len(accuracies) > 1 else None)
    return Series(name, tuple(places), tuple(means), look, tuple(bounds))


def _epsilon_so_far(record: Record, point: Mapping[str, Any]) -> Any:
    return point.get("epsilon") if guarded(record) else None


def _megabytes(record: Record, steps: Any) -> float | None:
    each, taken = q.result(record, "bytes_per_step", "release_bytes"), q.number(steps)
    return None if each is None or taken is None else each * taken / MB


def _sent(record: Record) -> float | None:
    curves = _curves(record)
    return _megabytes(record, curves[0][-1].get("step")) if curves else None


# ------------------------------------------------------------------ variants


def _how(record: Record) -> tuple[str, bool, bool]:
    said = record.setting
    shorter = ", shorter" if (q.number(said.get("clip_norm")) or 1.0) < 1.0 else ""
    return (
        str(said.get("compress", "none")) + shorter,
        bool(said.get("compress_before_clipping", False)),
        record.is_private,
    )


def _variant(record: Record) -> str:
    return _COMPRESSED[_how(record)][0] if _how(record) in _COMPRESSED else record.way


def _variant_look(record: Record) -> Look:
    return _COMPRESSED[_how(record)][1] if _how(record) in _COMPRESSED else Look("ideal")


def _optimizer(record: Record) -> str:
    name, _ = _MOMENTA.get(str(record.setting.get("optimizer")), (record.way, ""))
    compressed = " + top-k" if record.setting.get("compress") == "topk" else ""
    return ("non-private SGD" if not record.is_private else name) + compressed


def _optimizer_look(record: Record) -> Look:
    _, colour = _MOMENTA.get(str(record.setting.get("optimizer")), ("", "ideal"))
    compressed = record.setting.get("compress") == "topk"
    line, marker = ("dash", "triangle") if compressed else ("solid", "circle")
    return Look(colour if record.is_private else "non-private", line, marker)


# ------------------------------------------------------------------ findings


def _accuracies(study: Study) -> dict[tuple[str, bool, bool], float]:
    return {_how(r): mean for r in study.ok() if (mean := q.accuracy(r)) is not None}


def _compare(
    study: Study, claim: str, higher: tuple[str, bool, bool], lower: tuple[str, bool, bool]
) -> Finding:
    """Whether one variant is more accurate than another, by more than a point."""
    found = _accuracies(study)
    if higher not in found or lower not in found:
        return finding(claim, None, "One of the two has no result.")
    names = _COMPRESSED[higher][0], _COMPRESSED[lower][0]
    said = f"{names[0]} {percent(found[higher])}, {names[1]} {percent(found[lower])}"
    return finding(claim, found[higher] > found[lower] + SAME, said, study)


def _noisy_mask_costs(study: Study) -> Finding:
    claim = "To keep the largest 1 % of the noisy gradient costs accuracy."
    return _compare(study, claim, ("none", False, True), ("topk", False, True))


def _public_helps(study: Study) -> Finding:
    claim = "A mask from public examples leads to a better model than the noisy gradient's own."
    return _compare(study, claim, ("public-topk", False, True), ("topk", False, True))


def _before_is_better(study: Study) -> Finding:
    claim = "The public mask is worth more before clipping, to what is kept, than after the noise."
    return _compare(study, claim, ("public-topk, shorter", True, True), ("public-topk", False, True))


def _leak_looks_better(study: Study) -> Finding:
    claim = "The mask that leaks looks better than that of the noisy gradient, for which epsilon is finite."
    return _compare(study, claim, ("leaky-topk-no-guarantee", False, True), ("topk", False, True))


def _by_optimizer(study: Study, compressed: bool) -> dict[str, float]:
    """Accuracies of the private runs."""
    return {
        str(r.setting.get("optimizer")): mean
        for r in study.ok()
        if r.is_private
        and "optimizer" in r.setting
        and (r.setting.get("compress") == "topk") == compressed
        and (mean := q.accuracy(r)) is not None
    }


def _momentum_helps(study: Study) -> Finding:
    claim = "Each of the three momenta is more accurate than private SGD at the same epsilon."
    found = _by_optimizer(study, compressed=False)
    if not _MOMENTA.keys() <= found.keys():
        return finding(claim, None, "Not all four have a result.")
    said = ", ".join(f"{_MOMENTA[name][0]} {percent(found[name])}" for name in _MOMENTA)
    holds = all(found[name] > found["sgd"] + SAME for name in _MOMENTA if name != "sgd")
    return finding(claim, holds, said, study)


def _top_k_costs(study: Study) -> Finding:
    claim = "To keep the largest 1 % of the noisy gradient costs accuracy with every optimizer."
    plain, compressed = (_by_optimizer(study, kind) for kind in (False, True))
    both = [name for name in _MOMENTA if name in plain and name in compressed]
    if not both:
        return finding(claim, None, "No optimizer has both results.")
    said = ", ".join(
        f"{_MOMENTA[name][0]} {percent(plain[name])} and {percent(compressed[name])}" for name in both
    )
    return finding(claim, all(plain[name] > compressed[name] + SAME for name in both), said, study)
