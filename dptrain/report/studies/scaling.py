"""Several devices: Figures 8, A.2, A.3 and A.4, and the simulation of a thousand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dptrain.report import names, palette
from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.common import (
    by_way,
    common_note,
    finding,
    listed,
    on_paper_hardware,
    per_example,
    percent,
    pick,
    ranking,
    rows_table,
    series,
    series_name,
    status,
    table,
    times,
    ways,
)
from dptrain.report.studies.cost import THROUGHPUT

ALWAYS = ("Model", "Library", "Method", "Devices")
#: a throughput, by number of devices
Curve = dict[int, float]


def devices(record: Record) -> int:
    """Devices of a case."""
    return int(record.case.get("devices", 1))


def curve(records: Sequence[Record]) -> Curve:
    """Examples per second by number of devices."""
    return {devices(r): v for r in sorted(records, key=devices) if (v := q.throughput(r))}


def share_of_ideal(points: Mapping[int, float], at: int) -> float:
    """Throughput over that of as many single devices; the smallest number of devices counts as ideal."""
    least = min(points)
    return points[at] / (points[least] * at / least)


def parallel_fraction(points: Mapping[int, float]) -> float | None:
    """p of Amdahl's law, speed-up(n) = 1 / (1 - p + p / n), by least squares of n / speed-up.

    The law is linear there: n / speed-up(n) = p + (1 - p) n, so that n / speed-up - n = p (1 - n).
    """
    if 1 not in points or len(points) < 2:
        return None
    n = np.array([d for d in points if d > 1], dtype=np.float64)
    speed_up = np.array([points[int(d)] / points[1] for d in n])
    weight = 1 - n
    return float(min(1.0, weight @ (n / speed_up - n) / (weight @ weight)))


def amdahl(fraction: float, n: float) -> float:
    """The speed-up of n devices where a fraction of the work is parallel (Amdahl, 1967)."""
    return 1 / (1 - fraction + fraction / n)


def _curves(study: Study) -> dict[str, tuple[Record, Curve]]:
    """By way of training; the non-private baseline of the private records where it has none of its own."""
    found = {name: (group[0], curve(group)) for name, group in ways(study.ok()).items()}
    return {name: pair for name, pair in found.items() if pair[1]}


def _sides(study: Study) -> tuple[Curve, Curve, str]:
    """Curves of non-private and of per-example (else any private) training, and the latter's name."""
    plain = curve(pick(study.ok(), "non-private", ("torch", "jax")))
    chosen = per_example(study.ok(), ("opacus", "torch", "jax"))
    chosen = chosen or pick(study.ok(), "auto", ("torch", "jax")) or [r for r in study.ok() if r.is_private]
    if not plain:
        plain = {devices(r): v for r in sorted(chosen, key=devices) if (v := q.baseline_throughput(r))}
    return plain, curve(chosen), chosen[0].way if chosen else "private"


def fig8(study: Study) -> Shown:
    """Throughput over the number of devices, beside the ideal. Figure A.3 is the same on other devices."""
    curves = _curves(study)
    measured = tuple(
        series(
            name,
            sorted((r for r in study.ok() if series_name(r) == name), key=devices),
            devices,
            q.throughput,
            palette.look(first.engine, first.method),
            q.throughput_interval,
        )
        for name, (first, _) in curves.items()
    )
    ideal = tuple(
        Series(
            f"ideal, {name}",
            tuple(points),
            tuple(points[min(points)] * n / min(points) for n in points),
            _ideal(first),
        )
        for name, (first, points) in curves.items()
    )
    chart = Chart(
        "line",
        "Throughput by number of devices",
        Axis("devices"),
        Axis("throughput (examples/s)"),
        (*measured, *ideal),
    )

    def ideal_share(record: Record) -> float | None:
        points = curves.get(series_name(record), (None, {}))[1]
        return 100 * share_of_ideal(points, devices(record)) if devices(record) in points else None

    findings = [_scales_better(study), _shares_at_eighty(study)]
    if study.name == "fig-a3":
        findings = findings[:1]
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, {**THROUGHPUT, "Share of ideal (%)": ideal_share}, ALWAYS),
        (chart,),
        tuple(findings),
        (*common_note(study), "The paper, 80 V100s: 69.2 % of ideal with privacy, 53.3 % without."),
    )


def _ideal(record: Record) -> Look:
    return Look(palette.look(record.engine, record.method).colour, "dot", "none", faint=True)


def _scales_better(study: Study) -> Finding:
    claim = "Private training keeps more of the ideal throughput on many devices than non-private training."
    plain, private, way = _sides(study)
    common = [n for n in plain if n in private]
    if len(common) < 2:
        return finding(claim, None, "It needs private and non-private results on two numbers of devices.")
    n = max(common)
    shares = [share_of_ideal({d: points[d] for d in common}, n) for points in (private, plain)]
    said = f"On {n} devices {way} has {percent(shares[0])} of ideal and non-private {percent(shares[1])}"
    return finding(claim, shares[0] > shares[1], said, study)


def _shares_at_eighty(study: Study) -> Finding:
    claim = "On 80 GPUs private training has 69.2 % of the ideal throughput and non-private 53.3 %."
    plain, private, _ = _sides(study)
    if paper.DEVICES not in plain or paper.DEVICES not in private:
        return finding(claim, None, "It needs 80 GPUs; the simulation predicts them.")
    shares = {
        "private": share_of_ideal(private, paper.DEVICES),
        "non-private": share_of_ideal(plain, paper.DEVICES),
    }
    holds = all(abs(share - paper.SHARE_OF_IDEAL[side]) <= 0.05 for side, share in shares.items())
    said = f"{percent(shares['private'])} and {percent(shares['non-private'])}."
    return on_paper_hardware(claim, holds, said, study)


def fig_a4(study: Study) -> Shown:
    """Speed-up over the number of devices, with fits of Amdahl's law."""
    drawn: list[Series] = []
    fractions: dict[str, float | None] = {}
    for name, (first, points) in _curves(study).items():
        look = palette.look(first.engine, first.method)
        fraction = fractions[name] = parallel_fraction(points)
        if 1 in points:
            dots = Look(look.colour, "none", look.marker)
            drawn.append(Series(name, tuple(points), tuple(v / points[1] for v in points.values()), dots))
        if fraction is not None:
            n = tuple(np.geomspace(1, max(points), 40).tolist())
            law = tuple(amdahl(fraction, d) for d in n)
            drawn.append(
                Series(f"Amdahl, {percent(fraction)} parallel", n, law, Look(look.colour, look.line, "none"))
            )
    most = max((max(points) for _, points in _curves(study).values()), default=1)
    if drawn and most > 1:
        drawn.append(Series("ideal", (1, most), (1.0, float(most)), palette.IDEAL))
    values = {
        **THROUGHPUT,
        "Speed-up": lambda r: _speed_up(r, study),
        "Parallel fraction of the fit (%)": lambda r: _scaled(fractions.get(series_name(r))),
    }
    also = {"Paper (%)": lambda r: 100 * paper.PARALLEL["private" if r.is_private else "non-private"]}
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values, ALWAYS, also=also),
        (
            Chart(
                "line",
                "Amdahl's law",
                Axis("devices", log=True),
                Axis("speed-up over one device", log=True),
                tuple(drawn),
            ),
        ),
        _fractions_judged(study),
        common_note(study),
    )


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _speed_up(record: Record, study: Study) -> float | None:
    points = _curves(study).get(series_name(record), (None, {}))[1]
    return points[devices(record)] / points[1] if 1 in points and devices(record) in points else None


def _fractions_judged(study: Study) -> tuple[Finding, ...]:
    better = "Private training has the larger parallel fraction."
    exact = "The parallel fractions are 99.5 % with privacy and 98.9 % without."
    plain, private, way = _sides(study)
    a, b = parallel_fraction(private), parallel_fraction(plain)
    if a is None or b is None:
        why = "It needs one device and several, with and without privacy."
        return finding(better, None, why), finding(exact, None, why)
    said = f"{percent(a, 2)} for {way} and {percent(b, 2)} without privacy"
    holds = abs(a - paper.PARALLEL["private"]) <= 0.005 and abs(b - paper.PARALLEL["non-private"]) <= 0.005
    return finding(better, a > b, said, study), on_paper_hardware(exact, holds, f"{said}.", study)


def fig_a2(study: Study) -> Shown:
    """TF32 and several devices together."""
    one = ranking(
        (r for r in study.ok() if devices(r) == 1),
        "One device",
        Axis("throughput (examples/s)"),
        q.throughput,
        q.throughput_interval,
        name=lambda r: f"{r.way}, {names.precision(r.case['precision'])}",
        appearance=_precise,
    )
    many = tuple(
        series(name, sorted(g, key=devices), devices, q.throughput, _precise(g[0]), q.throughput_interval)
        for name, g in _by_precision(study).items()
        if len({devices(r) for r in g}) > 1
    )
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, THROUGHPUT, (*ALWAYS, "Precision")),
        (
            one,
            Chart(
                "line",
                "Several devices",
                Axis("devices", log=True),
                Axis("throughput (examples/s)", log=True),
                many,
            ),
        ),
        (_gains_add_up(study),),
        common_note(study),
    )


def _by_precision(study: Study) -> dict[str, list[Record]]:
    return {
        f"{name}, {names.precision(p)}": own
        for name, group in by_way(study.ok()).items()
        for p in sorted({r.case["precision"] for r in group})
        if (own := [r for r in group if r.case["precision"] == p])
    }


def _precise(record: Record) -> Look:
    look = palette.look(record.engine, record.method)
    lower = record.case["precision"] != "fp32"
    return Look(look.colour, "dash" if lower else "solid", look.marker, faint=not lower)


def _gains_add_up(study: Study) -> Finding:
    claim = "The gains of TF32 and of several devices add up."
    said, holds = [], []
    for name, group in by_way(study.ok()).items():
        found = {(r.case["precision"], devices(r)): v for r in group if (v := q.throughput(r))}
        most = max((n for p, n in found if p == "tf32" and ("fp32", n) in found), default=1)
        corners = [(p, n) for p in ("fp32", "tf32") for n in (1, most)]
        if most > 1 and all(corner in found for corner in corners):
            alone, together = found["tf32", 1] / found["fp32", 1], found["tf32", most] / found["fp32", most]
            holds.append(together >= 0.85 * alone and together > 1)
            said.append(f"TF32 brings {name} {times(alone)} on one and {times(together)} on {most} devices")
    if not holds:
        return finding(claim, None, "It needs FP32 and TF32, each on one device and on several.")
    return finding(claim, all(holds), listed(said), study)


def simulation(study: Study) -> Shown:
    """Throughput predicted up to a thousand devices."""
    curves = {
        str(name): points
        for name, raw in (study.extra.get("curves") or {}).items()
        if (points := _points(raw))
    }
    drawn: list[Series] = []
    for name, points in curves.items():
        method = {"non-private": "non-private", "dptrain": "auto"}.get(name, "per-example")
        shares = tuple(100 * _share(points, n) for n in points)
        drawn.append(Series(name, tuple(points), shares, palette.look("torch", method)))
    known = tuple(
        Series(
            f"paper, {side}",
            (paper.DEVICES,),
            (100 * share,),
            Look("non-private" if side == "non-private" else "per-example", "none", "diamond"),
        )
        for side, share in paper.SHARE_OF_IDEAL.items()
    )
    throughputs = tuple(
        Series(s.name, s.x, tuple(curves[s.name].values()), Look(s.look.colour, s.look.line, "none"))
        for s in drawn
    )
    numbers = sorted({n for points in curves.values() for n in points if _is_round(n)})
    rows = [
        {"Devices": n}
        | {f"{name} (examples/s)": _at(points, n) for name, points in curves.items()}
        | {f"{name} (% of ideal)": 100 * _share(points, n) for name, points in curves.items()}
        | {
            f"Paper, {side} (%)": 100 * v if n == paper.DEVICES else None
            for side, v in paper.SHARE_OF_IDEAL.items()
        }
        for n in numbers
    ]
    columns = list(rows[0]) if rows else ["Devices"]
    predicted = study.extra.get("predicted") or {}
    said = listed(
        (f"{k} {v:.4g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in predicted.items()), 8
    )
    lines = tuple(Series(s.name, s.x, s.y, Look(s.look.colour, s.look.line, "none")) for s in drawn)
    return Shown(
        study.name,
        study.title,
        study.shows,
        rows_table(rows, columns),
        (
            Chart(
                "line",
                "Predicted throughput",
                Axis("devices", log=True),
                Axis("throughput (examples/s)", log=True),
                throughputs,
            ),
            Chart(
                "line",
                "Predicted share of ideal",
                Axis("devices", log=True),
                Axis("share of the ideal throughput (%)"),
                (*lines, *known) if lines else (),
            ),
            *_measured_panel(study),
        ),
        (_predicts_the_paper(curves), _predicts_the_order(curves)),
        (*common_note(study), *((f"Predicted: {said}.",) if said else ()), *_simulation_notes(study)),
    )


def _measured_panel(study: Study) -> tuple[Chart, ...]:
    """Shares of ideal from the step that was measured here, on the same network."""
    drawn = []
    for name, raw in (study.extra.get("measured_curves") or {}).items():
        if points := _points(raw):
            method = "non-private" if str(name).startswith("non") else "auto"
            look = Look(method, "solid", "none")
            drawn.append(
                Series(str(name), tuple(points), tuple(100 * _share(points, n) for n in points), look)
            )
    axes = Axis("devices", log=True), Axis("share of the ideal throughput (%)")
    return (Chart("line", "From the step measured here", *axes, tuple(drawn)),) if drawn else ()


def _simulation_notes(study: Study) -> tuple[str, ...]:
    notes = []
    variants = study.extra.get("variants")
    if isinstance(variants, Mapping) and variants:
        parts = (f"{name} {percent(v) if (v := q.number(raw)) else raw}" for name, raw in variants.items())
        notes.append(f"With other assumptions, private training on 80 GPUs: {listed(parts, 12)}.")
    notes += [f"{r.way}: {status(r)}" for r in study.records if not r.ok]
    return tuple(notes)


def _points(raw: Any) -> dict[int, float]:
    pairs = [(q.number(p[0]), q.number(p[1])) for p in raw or () if isinstance(p, Sequence) and len(p) == 2]
    return {int(n): v for n, v in sorted((n, v) for n, v in pairs if n and v)}


def _at(points: Mapping[int, float], n: int) -> float:
    """Between the points of a curve, on a straight line in logarithms."""
    known = list(points)
    return math.exp(np.interp(math.log(n), np.log(known), np.log([points[k] for k in known])))


def _share(points: Mapping[int, float], n: int) -> float:
    least = min(points)
    return _at(points, n) / (points[least] * n / least)


def _is_round(n: int) -> bool:
    return n == paper.DEVICES or str(n).rstrip("0") in ("1", "2", "5") or n & (n - 1) == 0


def _predicts_the_paper(curves: Mapping[str, dict[int, float]]) -> Finding:
    claim = (
        "Fitted to non-private training, the model predicts the private 69.2 % of ideal on 80 GPUs "
        "within 5 points."
    )
    private = curves.get("private")
    if not private or not min(private) <= paper.DEVICES <= max(private):
        return finding(claim, None, "There is no private curve that reaches 80 devices.")
    share = _share(private, paper.DEVICES)
    plain = curves.get("non-private")
    fitted = (
        f", {percent(_share(plain, paper.DEVICES))} for non-private, which is fitted to 53.3 %"
        if plain
        else ""
    )
    holds = abs(share - paper.SHARE_OF_IDEAL["private"]) <= 0.05
    return finding(claim, holds, f"It predicts {percent(share)}{fitted}.")


def _predicts_the_order(curves: Mapping[str, dict[int, float]]) -> Finding:
    claim = "Private training scales better, as it is slower and saturates the network later."
    private, plain = curves.get("private"), curves.get("non-private")
    if not private or not plain:
        return finding(claim, None, "There are no two curves.")
    n = min(max(private), max(plain))
    a, b = _share(private, n), _share(plain, n)
    return finding(
        claim,
        a > b,
        f"On {n:,} devices {percent(a)} of ideal with privacy and {percent(b)} without are predicted.",
    )
