"""Where the time of a step goes: Table A3, and the timing and the profile of ml-privacy-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dptrain.report import names, palette
from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.common import (
    PER_EXAMPLE,
    common_note,
    finding,
    listed,
    near,
    on_paper_hardware,
    ordered_models,
    over_models,
    per_example,
    percent,
    pick,
    rows_table,
    status,
    table,
    times,
)
from dptrain.report.studies.cost import RATIO, THROUGHPUT

if TYPE_CHECKING:
    import pandas as pd

ORDER = ("data", "forward", "backward", "norms", "clip and accumulate", "noise", "optimizer step", "other")
#: images of CIFAR-10 that ml-privacy-exp trains on in an epoch
EPOCH = 50_000


def _ordered(sections: dict[str, float]) -> dict[str, float]:
    rank = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(sections.items(), key=lambda item: rank.get(item[0], len(ORDER))))


def _profiles(study: Study) -> dict[str, tuple[Look, dict[str, float]]]:
    """Seconds of sections by way of training, the non-private one first."""
    found: dict[str, tuple[Look, dict[str, float]]] = {}
    for record in study.ok("profile"):
        if base := q.sections(record, baseline=True):
            name = names.way(record.engine, "non-private")
            found.setdefault(_in_model(study, record, name), (_look(record, "non-private"), _ordered(base)))
        if own := q.sections(record):
            found[_in_model(study, record, record.way)] = (_look(record, record.method), _ordered(own))
    return dict(sorted(found.items(), key=lambda item: item[1][0].colour != "non-private"))


def _look(record: Record, method: str) -> Look:
    """Bars have no markers: a peer's are paler than ours."""
    faint = record.engine not in names.OURS and names.method(method) != "non-private"
    return Look(palette.look(record.engine, method).colour, faint=faint)


def _in_model(study: Study, record: Record, name: str) -> str:
    several = len({r.model for r in study.ok("profile")}) > 1
    return f"{name}, {names.model(record.model)}" if several else name


def _sections_chart(profiles: dict[str, tuple[Look, dict[str, float]]], title: str) -> Chart:
    seen = {section for _, values in profiles.values() for section, v in values.items() if v > 0}
    categories = tuple(s for s in ORDER if s in seen) + tuple(sorted(seen - set(ORDER)))
    made = tuple(
        Series(
            name,
            tuple(s for s in categories if s in values),
            tuple(1000 * values[s] for s in categories if s in values),
            look,
        )
        for name, (look, values) in profiles.items()
    )
    return Chart("bar", title, Axis("", categories=categories), Axis("time (ms)"), made)


def _sections_table(study: Study, papers: dict[str, dict[str, float]]) -> pd.DataFrame:
    """A row for each section, a column for each way; what has no result is a row of its own below."""
    profiles = _profiles(study)
    chosen = [s for s in ORDER if any(s in values for _, values in profiles.values())] or list(ORDER)
    rows: list[dict[str, Any]] = []
    for section in chosen:
        row: dict[str, Any] = {"Section": section.capitalize()}
        row |= {f"{name} (ms)": _ms(values.get(section)) for name, (_, values) in profiles.items()}
        row |= {name: known.get(section) for name, known in papers.items()}
        rows.append(row)
    if profiles:
        total: dict[str, Any] = {"Section": "Sum"}
        total |= {f"{name} (ms)": _ms(sum(values.values())) for name, (_, values) in profiles.items()}
        total |= {name: sum(known.values()) for name, known in papers.items()}
        rows.append(total)
    failed = [r for r in study.records if not r.ok]
    columns = ["Section", *(f"{name} (ms)" for name in profiles), *papers]
    if failed:
        columns.append("Status")
        rows += [{"Section": f"{r.way}, {names.model(r.model)}", "Status": status(r)} for r in failed]
    return rows_table(rows, columns)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def table_a3(study: Study) -> Shown:
    """Milliseconds of each section, without and with privacy."""
    papers = {
        "Paper, non-private (ms)": {k: v[0] for k, v in paper.SECTIONS_MS.items()},
        "Paper, Opacus per-example (ms)": {k: v[1] for k, v in paper.SECTIONS_MS.items()},
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        _sections_table(study, papers),
        (_sections_chart(_profiles(study), "Time of a step by section"),),
        (_backward_grows_most(study), _backward_four_times(study), _clipping_is_extra(study)),
        common_note(study),
    )


def _per_example(study: Study) -> Record | None:
    found = per_example(study.ok("profile"))
    return next((r for r in found if q.sections(r) and q.sections(r, baseline=True)), None)


def _backward_grows_most(study: Study) -> Finding:
    claim = "The backward pass with per-example gradients is the largest part of what privacy adds."
    record = _per_example(study)
    if record is None:
        return finding(claim, None, "There is no profile of per-example clipping.")
    own, base = q.sections(record), q.sections(record, baseline=True)
    added = {s: own.get(s, 0.0) - base.get(s, 0.0) for s in {*own, *base}}
    ranked = sorted(added, key=lambda s: -added[s])
    said = listed(f"{s} {1000 * added[s]:+.1f} ms" for s in ranked[:4])
    return finding(claim, ranked[0] == "backward", f"{record.way}: {said}", study)


def _backward_four_times(study: Study) -> Finding:
    plain, private = paper.SECTIONS_MS["backward"]
    claim = f"Per-example clipping makes the backward pass {times(private / plain)} as long."
    record = _per_example(study)
    a = q.sections(record).get("backward") if record else None
    b = q.sections(record, baseline=True).get("backward") if record else None
    if record is None or not a or not b:
        return finding(claim, None, "There is no profile of per-example clipping.")
    said = f"{record.way}: {times(a / b)}."
    return on_paper_hardware(claim, near(a / b, private / plain, 0.25), said, study)


def _clipping_is_extra(study: Study) -> Finding:
    claim = "Clipping and accumulating add a section that is smaller than the backward pass."
    record = _per_example(study)
    if record is None:
        return finding(claim, None, "There is no profile of per-example clipping.")
    own = q.sections(record)
    clipping = own.get("clip and accumulate", 0.0) + own.get("norms", 0.0)
    backward = own.get("backward", 0.0)
    said = f"{record.way}: {1000 * clipping:.1f} ms beside {1000 * backward:.1f} ms"
    return finding(claim, 0 < clipping < backward, said, study)


def dp_runtime_profile(study: Study) -> Shown:
    """The sections of a private step, as ml-privacy-exp profiles them."""
    traces = [t for r in study.ok("profile") for t in r.results.get("traces") or ()]
    notes = [
        "ml-privacy-exp in JAX, VGG11 on one 1080Ti: of an epoch of 40.75 s, 18.25 s are per-example "
        "gradients, 8.75 s clipping and 0.48 s noise."
    ]
    if traces:
        notes.append(f"Traces for TensorBoard and Perfetto: {listed(map(str, traces))}.")
    return Shown(
        study.name,
        study.title,
        study.shows,
        _sections_table(study, {}),
        (_sections_chart(_profiles(study), "Time of a step by section"),),
        (_gradients_first(study), _noise_is_little(study)),
        (*common_note(study), *notes),
    )


def _private_shares(study: Study) -> list[tuple[Record, dict[str, float]]]:
    found = []
    for record in study.ok("profile"):
        sections = q.sections(record)
        if record.is_private and (total := sum(sections.values())):
            found.append((record, {s: v / total for s, v in sections.items()}))
    return found


def _gradients_first(study: Study) -> Finding:
    claim = "Per-example gradients take the largest part of a private step, clipping the next."
    found = [(r, s) for r, s in _private_shares(study) if r.method in PER_EXAMPLE]
    if not found:
        return finding(claim, None, "There is no profile of per-example clipping.")
    said, holds = [], []
    for record, shares in found:
        clipping = shares.get("clip and accumulate", 0.0) + shares.get("norms", 0.0)
        rest = max((shares.get(s, 0.0) for s in ("noise", "optimizer step", "data")), default=0.0)
        backward = shares.get("backward", 0.0)
        holds.append(backward > clipping > rest)
        said.append(
            f"{record.way}, {names.model(record.model)}: {percent(backward)}, "
            f"clipping {percent(clipping)}, next {percent(rest)}"
        )
    return finding(claim, all(holds), listed(said), study)


def _noise_is_little(study: Study) -> Finding:
    claim = "Noise costs next to nothing (1 % of the time)."
    found = [(r, s.get("noise", 0.0)) for r, s in _private_shares(study)]
    if not found:
        return finding(claim, None, "There is no profile of a private step.")
    said = listed(f"{percent(share)} for {r.way} on {names.model(r.model)}" for r, share in found)
    evidence = f"{said}; up to 5 % of a logical step of one physical batch counts as next to nothing"
    return finding(claim, all(share <= 0.05 for _, share in found), evidence, study)


def epoch_s(record: Record) -> float | None:
    """Seconds for 50,000 examples."""
    rate = q.throughput(record)
    return EPOCH / rate if rate else None


def dp_timing(study: Study) -> Shown:
    """Seconds of an epoch of CIFAR-10, public and private."""
    charts = over_models(
        study.ok(), "Time of an epoch", Axis("time of 50,000 examples (s)", log=True), epoch_s
    )
    values = {"Epoch (s)": epoch_s, **THROUGHPUT, "Relative to non-private": RATIO["Relative to non-private"]}
    also = {
        "Paper, VGG11 on a 1080Ti (s)": lambda r: paper.EPOCH_S.get(r.method) if r.model == "vgg11" else None
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values, also=also),
        charts,
        (_per_example_is_slow(study), _mixed_ghost_recovers(study)),
        common_note(study),
    )


def _of(study: Study, model: str) -> list[Record]:
    return [r for r in study.ok() if r.model == model]


def _fastest(records: Sequence[Record]) -> Record | None:
    return min(records, key=lambda r: epoch_s(r) or float("inf"), default=None)


def _per_example_is_slow(study: Study) -> Finding:
    claim = "An epoch takes several times as long with per-example clipping (×7.9 for VGG11)."
    said, holds = [], []
    for model in ordered_models(study.ok()):
        slow = _fastest(per_example(_of(study, model)))
        if slow is None:
            continue
        base = _fastest(pick(_of(study, model), "non-private"))
        a, b = epoch_s(slow), epoch_s(base) if base else None
        ratio = a / b if a and b else q.cost(slow)
        if ratio:
            holds.append(ratio >= 2)
            said.append(f"{times(ratio)} for {slow.way} on {names.model(model)}")
    if not holds:
        return finding(claim, None, "Per-example clipping or non-private training has no result.")
    return finding(claim, all(holds), f"{listed(said)}; ×2 counts as several", study)


def _mixed_ghost_recovers(study: Study) -> Finding:
    claim = "Mixed ghost clipping takes less than half of the time of per-example clipping (×0.38 for VGG11)."
    said, holds = [], []
    for model in ordered_models(study.ok()):
        slow = _fastest(per_example(_of(study, model)))
        mixed = ("mixed-ghost", "bk-mixed-ghost", "bk-mix-opt")
        fast = _fastest(pick(_of(study, model), mixed, ("private-vision", "torch", "fastdp")))
        a, b = (epoch_s(fast) if fast else None), (epoch_s(slow) if slow else None)
        if slow and fast and a and b:
            holds.append(a / b < 0.5)
            said.append(f"{times(a / b)} of {slow.way} for {fast.way} on {names.model(model)}")
    if not holds:
        return finding(claim, None, "Mixed ghost clipping or per-example clipping has no result.")
    return finding(claim, all(holds), listed(said), study)
