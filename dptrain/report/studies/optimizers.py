"""Optimizers of private gradients: their accuracies side by side."""

from __future__ import annotations

from typing import Any

from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Finding, Look, Shown
from dptrain.report.studies.accuracy import ACCURACY, same
from dptrain.report.studies.common import common_note, finding, listed, percent, ranking, table

#: by optimizer
_COLOURS = {
    "sgd": "per-example",
    "momentum": "ghost",
    "adam": "bk-ghost",
    "adam-bc": "auto",
}


def optimizers(study: Study) -> Shown:
    """Test accuracy by optimizer, of the last weights and of their average."""
    chart = ranking(
        study.ok(), "Test accuracy", Axis("test accuracy"), q.accuracy, q.accuracy_interval, None, name, _look
    )
    also = {
        "Optimizer": _optimizer,
        "Weights": lambda r: "averaged" if _settings(r).get("weight_average") else "last",
        "Learning rate": lambda r: _settings(r).get("lr"),
    }
    found = table(study, ACCURACY, ("Model",), never=("Method",), also=also)
    first = [column for column in also if column in found.columns]
    found = found[[*first, *(column for column in found.columns if column not in first)]]
    judges = (_average_helps, _correction_helps, _filter_helps)
    findings = tuple(judge(study) for judge in judges)
    return Shown(study.name, study.title, study.shows, found, (chart,), findings, common_note(study))


def name(record: Record) -> str:
    """The optimizer, and what is made of its steps."""
    return _optimizer(record) + (", averaged" if _settings(record).get("weight_average") else "")


def _settings(record: Record) -> dict[str, Any]:
    pairs = record.case.get("settings") or ()
    return {str(pair[0]): pair[1] for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2}


def _optimizer(record: Record) -> str:
    settings = _settings(record)
    gain = settings.get("denoise")
    return str(settings.get("optimizer", "momentum")) + (f", DiSK {gain:g}" if gain else "")


def _look(record: Record) -> Look:
    settings = _settings(record)
    colour = _COLOURS.get(str(settings.get("optimizer")), "ideal")
    if settings.get("denoise"):
        colour = "bk-mix-opt"
    return Look(colour, "solid" if settings.get("weight_average") else "dot")


def _average_helps(study: Study) -> Finding:
    claim = "Averaging the weights helps, whatever the optimizer."
    return _judged(study, claim, {"weight_average": True}, {"weight_average": False})


def _correction_helps(study: Study) -> Finding:
    claim = "Adam does better without the noise in its second moment."
    return _judged(study, claim, {"optimizer": "adam-bc"}, {"optimizer": "adam"})


def _filter_helps(study: Study) -> Finding:
    claim = "An optimizer does better with gradients that DiSK filtered."
    return _judged(study, claim, {"denoise": True}, {"denoise": False})


def _judged(study: Study, claim: str, better: dict[str, Any], worse: dict[str, Any]) -> Finding:
    """Whether what differs in nothing but `better` and `worse` is more accurate, in each pair."""
    by_kind = {_kind(r): r for r in study.ok() if q.accuracy(r) is not None and not r.unsound}
    pairs = []
    for kind, record in by_kind.items():
        other = by_kind.get(tuple((dict(kind) | worse).items()))
        if all(dict(kind)[key] == value for key, value in better.items()) and other is not None:
            pairs.append((record, other))
    if not pairs:
        return finding(claim, None, "No two runs differ in this alone.")
    higher = [(q.accuracy(a) or 0) > (q.accuracy(b) or 0) for a, b in pairs]
    said = listed(
        f"{name(a)} {percent(q.accuracy(a) or 0)} against {percent(q.accuracy(b) or 0)}"
        + (" (intervals meet)" if same([a, b]) else "")
        for a, b in pairs
    )
    clear = all(up and not same(list(pair)) for up, pair in zip(higher, pairs, strict=True))
    return finding(claim, clear, said, study)


def _kind(record: Record) -> tuple[tuple[str, Any], ...]:
    settings = _settings(record)
    return (
        ("optimizer", str(settings.get("optimizer", "momentum"))),
        ("denoise", bool(settings.get("denoise"))),
        ("weight_average", bool(settings.get("weight_average"))),
    )
