"""Lower precision and compilation: Figures 7 and A.1, and TF32 at the best number of steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from dptrain.report import intervals, names, palette
from dptrain.report import quantities as q
from dptrain.report.intervals import Interval
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.accuracy import ACCURACY
from dptrain.report.studies.common import (
    PER_EXAMPLE,
    Bounds,
    Number,
    by_way,
    common_note,
    finding,
    lines,
    listed,
    near,
    on_paper_hardware,
    over_models,
    per_example,
    percent,
    pick,
    table,
    times,
    ways,
)
from dptrain.report.studies.cost import THROUGHPUT

NO_TF32 = "There is no result in TF32 beside one in FP32; TF32 needs an Nvidia GPU from Ampere on."


def _twin(record: Record, records: Sequence[Record], precision: str = "fp32") -> Record | None:
    """The record that differs in precision alone."""

    def rest(r: Record) -> dict[str, Any]:
        return {k: v for k, v in r.case.items() if k != "precision"}

    same = (r for r in records if r.ok and r.case.get("precision") == precision and rest(r) == rest(record))
    return next(same, None)


def fig7(study: Study) -> Shown:
    """Throughput of lower precision over that of FP32, over model sizes."""
    ok = [r for r in study.ok() if r.measure in ("throughput", "batch-size", "scaling")]

    def gain(record: Record) -> float | None:
        twin = _twin(record, ok)
        own, base = q.throughput(record), q.throughput(twin) if twin else None
        return own / base if own and base else None

    def bounds(record: Record) -> Interval | None:
        twin = _twin(record, ok)
        if twin is None:
            return None
        steps = [q.logical_steps_s(q.contestant(r), q.accumulate(r)) for r in (twin, record)]
        return intervals.of_ratio(*steps)

    lower = [r for r in ok if r.case.get("precision") != "fp32"]
    precisions = list(dict.fromkeys(r.case["precision"] for r in lower))
    charts = tuple(
        panel
        for p in precisions
        for panel in over_models(
            [r for r in lower if r.case["precision"] == p],
            f"{names.precision(p)} over FP32",
            Axis(f"{names.precision(p)} / FP32 throughput"),
            gain,
            bounds,
            reference=(1.0, "FP32"),
        )
    )
    always = ("Model", "Library", "Method", "Precision")
    tf32 = {
        (r.method, r.engine, r.model): v for r in lower if r.case["precision"] == "tf32" and (v := gain(r))
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, {**THROUGHPUT, "Over FP32": gain, "Largest batch": q.largest}, always),
        charts,
        (_speeds_up(study, tf32), *_peaks(study, tf32), _no_larger_batch(study)),
        common_note(study),
    )


Gains = dict[tuple[str, str, str], float]


def _speeds_up(study: Study, gains: Gains) -> Finding:
    claim = "TF32 is faster than FP32, with privacy and without."
    if not gains:
        return finding(claim, None, NO_TF32)
    low, high = min(gains.values()), max(gains.values())
    return finding(claim, low > 1, f"From {times(low)} to {times(high)} in {len(gains)} cases", study)


def _peaks(study: Study, gains: Gains) -> tuple[Finding, Finding]:
    plain = "Without privacy, the gain of TF32 grows with model size, to nearly ×4 at ViT-Huge."
    private = (
        "With per-example clipping, the gain of TF32 is largest at ViT-Base and falls for larger models."
    )
    sizes = [m for m in names.PAPER_MODELS if m.startswith("vit")]
    a = {m: gains["non-private", "torch", m] for m in sizes if ("non-private", "torch", m) in gains}
    clipped = [e for e in ("opacus", "torch") if any(k[0] in PER_EXAMPLE and k[1] == e for k in gains)]
    b = {
        k[2]: v
        for k, v in gains.items()
        if clipped and k[0] in PER_EXAMPLE and k[1] == clipped[0] and k[2] in sizes
    }
    missing = "It needs TF32 results of every size of ViT."
    first = (
        on_paper_hardware(
            plain,
            list(a.values()) == sorted(a.values()) and near(a["vit-huge"], 4, 0.2),
            listed(f"{times(v)} on {names.model(m)}" for m, v in a.items()) + ".",
            study,
        )
        if len(a) == len(sizes)
        else finding(plain, None, missing)
    )
    second = (
        on_paper_hardware(
            private,
            max(b, key=lambda m: b[m]) == "vit-base",
            listed(f"{times(b[m])} on {names.model(m)}" for m in sizes) + ".",
            study,
        )
        if len(b) == len(sizes)
        else finding(private, None, missing)
    )
    return first, second


def _no_larger_batch(study: Study) -> Finding:
    claim = "TF32 does not make a larger physical batch fit."
    tf32 = [r for r in study.ok("batch-size") if r.case.get("precision") == "tf32"]
    pairs = [(q.largest(r), q.largest(t)) for r in tf32 if (t := _twin(r, study.ok("batch-size")))]
    known = [(a, b) for a, b in pairs if a and b]
    if not known:
        return finding(claim, None, "The largest batch was not measured in TF32 and in FP32.")
    said = listed(f"{a:,.0f} and {b:,.0f}" for a, b in known)
    return finding(claim, all(near(a, b, 0.03) for a, b in known), f"TF32 and FP32: {said}", study)


def fig_a1(study: Study) -> Shown:
    """Compile time over the physical batch."""
    ok = study.ok("compile")

    def seconds(record: Record) -> float | None:
        return q.result(record, "compile_s")

    def bounds(record: Record) -> Interval | None:
        """Of the first step there is one sample: the interval is that of the later ones."""
        later, first = q.samples(record.results.get("raw_later_step_s")), q.result(record, "first_step_s")
        found = intervals.of_median(later)
        return (first - found[1], first - found[0]) if found and first is not None else None

    chart = Chart(
        "line",
        "Compile time by physical batch",
        Axis("physical batch size (examples)", log=True),
        Axis("compile time (s)"),
        lines(ok, lambda r: r.case["batch_size"], seconds, bounds),
    )
    values = {
        "First step (s)": lambda r: q.result(r, "first_step_s"),
        "Later steps (s)": lambda r: q.result(r, "later_step_s"),
        "Compile time (s)": seconds,
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values, ("Model", "Library", "Method", "Physical batch")),
        (chart,),
        (_grows_with_batch(study, ok), _private_compiles_longer(study, ok)),
        common_note(study),
    )


def _compile_times(group: Sequence[Record]) -> dict[int, float]:
    found = {r.case["batch_size"]: q.result(r, "compile_s") for r in group}
    return {size: found[size] for size in sorted(found) if found[size] is not None}  # type: ignore[misc]


def _grows_with_batch(study: Study, ok: Sequence[Record]) -> Finding:
    claim = "Compile time in JAX grows with the physical batch."
    said, holds = [], []
    for name, group in ways(r for r in ok if paper.framework(r) == "jax").items():
        found = _compile_times(group)
        if len(found) > 1:
            (small, a), *_, (big, b) = found.items()
            # A step towards growth that no one would see in the figure is none.
            holds.append(b > 1.1 * a)
            said.append(f"{name} {a:.2g} s at {small} and {b:.2g} s at {big}")
    if not holds:
        return finding(claim, None, "No method in JAX has results at two physical batch sizes.")
    return finding(claim, all(holds), f"{listed(said)}; less than 10 % more is no growth", study)


def _private_compiles_longer(study: Study, ok: Sequence[Record]) -> Finding:
    claim = "The private step takes longer to compile in JAX than the non-private one."
    jax = [r for r in ok if r.engine == "jax"]
    plain = _compile_times(pick(jax, "non-private", ("jax",)))
    private = _compile_times(per_example(jax, ("jax",)) or [r for r in jax if r.is_private])
    common = [size for size in plain if size in private]
    if not common:
        return finding(claim, None, "There is no physical batch at which both were compiled.")
    ratios = [private[size] / plain[size] for size in common]
    said = listed(f"{times(v)} at batch {size}" for size, v in zip(common, ratios))
    return finding(claim, statistics.median(ratios) > 1, said, study)


def tf32_steps(study: Study) -> Shown:
    """Accuracy and duration of a run in FP32 and in TF32."""
    ok = study.ok("accuracy")

    def speed(record: Record) -> float | None:
        twin = _twin(record, ok)
        own, base = q.run_seconds(record), q.run_seconds(twin) if twin else None
        return base / own if own and base else None

    precisions = tuple(dict.fromkeys(names.precision(r.case["precision"]) for r in ok))
    values = {**ACCURACY, "Duration (s)": q.run_seconds, "Speed over FP32": speed}
    also = {
        "Paper, accuracy": lambda r: paper.TF32_ACCURACY,
        "Paper, speed": lambda r: paper.TF32_SPEED if r.case.get("precision") == "tf32" else None,
    }
    panels = tuple(
        Chart("bar", title, Axis("precision", categories=precisions), axis, _bars(ok, value, bounds))
        for title, axis, value, bounds in (
            ("Test accuracy", Axis("test accuracy"), q.accuracy, q.accuracy_interval),
            ("Duration of training", Axis("duration (s)"), q.run_seconds, _run_interval),
        )
    )
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values, ("Model", "Library", "Method", "Precision"), also=also),
        panels,
        (*_same_accuracy_faster(study, ok, speed),),
        common_note(study),
    )


def _run_interval(record: Record) -> Interval | None:
    return intervals.of_median(q.samples(record.results.get("raw_seconds")))


def _bars(records: Sequence[Record], value: Number, bounds: Bounds) -> tuple[Series, ...]:
    made = []
    for name, group in by_way(records).items():
        own = [(r, v) for r in group if (v := value(r)) is not None]
        look = palette.look(group[0].engine, group[0].method)
        if own:
            made.append(
                Series(
                    name,
                    tuple(names.precision(r.case["precision"]) for r, _ in own),
                    tuple(v for _, v in own),
                    Look(look.colour),
                    tuple(bounds(r) for r, _ in own),
                )
            )
    return tuple(made)


def _same_accuracy_faster(study: Study, ok: Sequence[Record], speed: Number) -> tuple[Finding, Finding]:
    same = "TF32 reaches the accuracy of FP32 (0.879 each, at the best number of steps)."
    faster = "TF32 is 2.3 times as fast there."
    tf32 = [(r, t) for r in ok if r.case["precision"] == "tf32" and (t := _twin(r, ok))]
    known = [
        (r, a, b) for r, t in tf32 if (a := q.accuracy(r)) is not None and (b := q.accuracy(t)) is not None
    ]
    if not known:
        why = NO_TF32
        return finding(same, None, why), finding(faster, None, why)
    said = listed(f"{r.way} {percent(a)} and {percent(b)}" for r, a, b in known)
    gains = [v for r, _, _ in known if (v := speed(r))]
    first = finding(
        same,
        all(abs(a - b) <= 0.01 for _, a, b in known),
        f"TF32 and FP32: {said}; 1 point is allowed",
        study,
    )
    if not gains:
        return first, finding(faster, None, "The runs have no durations.")
    quick = f"{listed(map(times, gains))}."
    return first, on_paper_hardware(faster, all(near(g, paper.TF32_SPEED, 0.25) for g in gains), quick, study)
