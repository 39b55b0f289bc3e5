"""Accuracy: Table A4, and that it is the same at every physical batch size."""

from __future__ import annotations

from collections.abc import Sequence

from dptrain.report import names
from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.common import (
    common_note,
    finding,
    lines,
    listed,
    percent,
    ranking,
    series_name,
    table,
    ways,
)


def _epsilon(record: Record) -> float | None:
    found = q.samples(record.results.get("epsilons"))
    return max(found) if found else None


ACCURACY = {
    "Test accuracy": q.accuracy,
    "95 % from": lambda r: (q.accuracy_interval(r) or (None, None))[0],
    "95 % to": lambda r: (q.accuracy_interval(r) or (None, None))[1],
    "Runs": lambda r: len(q.samples(r.results.get("accuracies"))) or None,
    "Epsilon": _epsilon,
}

#: accuracies that differ by less, in a share of 1, count as the same where intervals do not tell
SAME = 0.01


def table_a4(study: Study) -> Shown:
    """Test accuracy of each method after two epochs."""
    chart = ranking(
        study.ok(),
        "Test accuracy",
        Axis("test accuracy"),
        q.accuracy,
        q.accuracy_interval,
    )
    always = ("Model", "Library", "Method", "Precision")
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, ACCURACY, always, also={"Paper": paper.table_a4}),
        (chart,),
        tuple(
            judge(study)
            for judge in (_method_does_not_matter, _tf32_does_not_matter, _jax_higher, _plain_lowest)
        ),
        common_note(study),
    )


def _bounds(record: Record) -> tuple[float, float]:
    """The interval, or the mean with `SAME` around it."""
    mean = q.accuracy(record)
    assert mean is not None
    low, high = q.accuracy_interval(record) or (mean, mean)
    return min(low, mean - SAME / 2), max(high, mean + SAME / 2)


def same(records: Sequence[Record]) -> bool:
    """Whether there is an accuracy that all intervals contain."""
    bounds = [_bounds(r) for r in records]
    return max(low for low, _ in bounds) <= min(high for _, high in bounds)


def _known(study: Study) -> list[Record]:
    return [r for r in study.ok() if q.accuracy(r) is not None and not r.unsound]


def _range(records: Sequence[Record]) -> str:
    ranked = sorted(records, key=lambda r: q.accuracy(r) or 0.0)
    low, high = (f"{percent(q.accuracy(r) or 0.0)} ({series_name(r)})" for r in (ranked[0], ranked[-1]))
    return f"from {low} to {high}"


def _method_does_not_matter(study: Study) -> Finding:
    claim = "The clipping method does not matter for accuracy."
    chosen = [
        r
        for r in _known(study)
        if r.is_private and paper.framework(r) == "torch" and r.case.get("precision") == "fp32"
    ]
    if len(chosen) < 2:
        return finding(claim, None, "Fewer than two private methods have a result.")
    holds = same(chosen)
    said = (
        f"{len(chosen)} methods, {_range(chosen)}; their intervals {'meet' if holds else 'do not all meet'}"
    )
    return finding(claim, holds, said, study)


def _tf32_does_not_matter(study: Study) -> Finding:
    claim = "TF32 does not change accuracy."
    found = _known(study)
    pairs = [
        (r, t)
        for r in found
        for t in found
        if (r.case.get("precision"), t.case.get("precision")) == ("tf32", "fp32")
        and (r.engine, r.method, r.model) == (t.engine, t.method, t.model)
    ]
    if not pairs:
        return finding(
            claim,
            None,
            "No method has a result in TF32 and in FP32; TF32 needs an Nvidia GPU from Ampere on.",
        )
    said = listed(
        f"{r.way} {percent(q.accuracy(r) or 0)} and {percent(q.accuracy(t) or 0)}" for r, t in pairs
    )
    return finding(claim, all(same(pair) for pair in pairs), said, study)


def _jax_higher(study: Study) -> Finding:
    claim = "JAX reaches a higher accuracy than PyTorch with the same method (unexplained in the paper)."
    groups: dict[str, list[Record]] = {"jax": [], "torch": []}
    for record in _known(study):
        if record.engine in names.OURS and record.is_private and record.case.get("precision") == "fp32":
            groups[record.engine].append(record)
    if not all(groups.values()):
        return finding(claim, None, "JAX or PyTorch has no result.")
    jax, torch = (max(g, key=lambda r: q.accuracy(r) or 0) for g in (groups["jax"], groups["torch"]))
    higher = (q.accuracy(jax) or 0) > (q.accuracy(torch) or 0) and not same([jax, torch])
    said = f"{jax.way} {percent(q.accuracy(jax) or 0)}, {torch.way} {percent(q.accuracy(torch) or 0)}"
    return finding(claim, higher, said, study)


def _plain_lowest(study: Study) -> Finding:
    claim = "Non-private training in PyTorch is far less accurate with these settings than private training."
    found = [r for r in _known(study) if paper.framework(r) == "torch" and r.case.get("precision") == "fp32"]
    plain, private = [r for r in found if not r.is_private], [r for r in found if r.is_private]
    if not plain or not private:
        return finding(claim, None, "Non-private or private training has no result.")
    a, b = q.accuracy(plain[0]) or 0, max(q.accuracy(r) or 0 for r in private)
    said = f"{percent(a)} without privacy and at most {percent(b)} with it"
    return finding(claim, a < b - 0.05, said, study)


def batch_size_accuracy(study: Study) -> Shown:
    """Accuracy over the physical batch size."""
    chart = Chart(
        "line",
        "Accuracy by physical batch",
        Axis("physical batch size (examples)", log=True),
        Axis("test accuracy"),
        lines(study.ok(), lambda r: r.case["batch_size"], q.accuracy, q.accuracy_interval),
    )
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, ACCURACY, ("Model", "Library", "Method", "Physical batch")),
        (chart,),
        (_same_at_every_batch(study),),
        common_note(study),
    )


def _same_at_every_batch(study: Study) -> Finding:
    claim = "Accuracy is the same at every physical batch size."
    said, holds = [], []
    for name, group in ways(_known(study)).items():
        for model in dict.fromkeys(r.model for r in group):
            own = [r for r in group if r.model == model]
            if len({r.case["batch_size"] for r in own}) < 2:
                continue
            values = [q.accuracy(r) or 0 for r in own]
            holds.append(same(own))
            sizes = ", ".join(str(r.case["batch_size"]) for r in own)
            said.append(f"{percent(min(values))} to {percent(max(values))} for {name} at batches {sizes}")
    if not holds:
        return finding(claim, None, "No method has results at two physical batch sizes.")
    return finding(claim, all(holds), listed(said), study)
