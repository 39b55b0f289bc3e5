"""What privacy costs in throughput: Figures 1, 3, 4, 5 and 6."""

from __future__ import annotations

from collections.abc import Sequence

from dptrain.report import names
from dptrain.report import quantities as q
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.common import (
    PER_EXAMPLE,
    common_note,
    device,
    finding,
    lines,
    listed,
    near,
    on_paper_hardware,
    ordered_models,
    over_models,
    per_example,
    percent,
    pick,
    ranking,
    series_name,
    table,
    times,
    ways,
)

OPTIMISED = ("ghost", "mixed-ghost", "bk-ghost", "bk-mixed-ghost", "bk-mix-opt", "auto")
BOOK_KEEPING = ("bk-ghost", "bk-mixed-ghost", "bk-mix-opt")

THROUGHPUT = {
    "Examples/s": q.throughput,
    "95 % from": lambda r: (q.throughput_interval(r) or (None, None))[0],
    "95 % to": lambda r: (q.throughput_interval(r) or (None, None))[1],
}
RATIO = {
    "Relative to non-private": q.ratio,
    "Ratio 95 % from": lambda r: (q.ratio_interval(r) or (None, None))[0],
    "Ratio 95 % to": lambda r: (q.ratio_interval(r) or (None, None))[1],
    "Best non-private": lambda r: str(r.results.get("baseline") or "").removeprefix("non-private ") or None,
}

#: what counts as reaching the speed of non-private training
REACHED = 0.95


def relative_to_plain(record: Record) -> float | None:
    """Throughput over that of the non-private way that is neither compiled nor scanned."""
    plain, own = q.plain_baseline(record), q.throughput(record)
    return own / plain[1]["examples_per_s"] if plain and own else q.ratio(record)


def fig1(study: Study) -> Shown:
    """Throughput relative to the non-private baseline of the same framework, over model sizes."""
    private = [r for r in study.ok() if r.is_private]
    charts = over_models(
        private,
        "Speed relative to non-private",
        Axis("throughput relative to non-private"),
        q.ratio,
        q.ratio_interval,
        reference=(1.0, "non-private"),
    )
    values = {**THROUGHPUT, **RATIO, "Relative to plain non-private": relative_to_plain}
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values),
        charts,
        (_optimised_reaches_plain(study, private), _optimised_beats_per_example(study)),
        common_note(study),
    )


def _optimised_reaches_plain(study: Study, private: Sequence[Record]) -> Finding:
    claim = "Optimised private training reaches the throughput of non-private training that is not optimised."
    fast = [r for r in private if r.method in (*OPTIMISED, *PER_EXAMPLE) and not r.unsound]
    fast = [r for r in fast if r.method not in PER_EXAMPLE or names.engine(r.engine) == "jax"]
    best: dict[str, Record] = {}
    for record in fast:
        if (value := relative_to_plain(record)) is None:
            continue
        other = best.get(record.model)
        if other is None or value > (relative_to_plain(other) or 0):
            best[record.model] = record
    if not best:
        return finding(claim, None, "No optimised private method has a result.")
    said = listed(
        f"{relative_to_plain(best[m]):.2f} on {names.model(m)} ({best[m].way})"
        for m in ordered_models(best.values())
    )
    reached = [(relative_to_plain(r) or 0) >= REACHED for r in best.values()]
    return finding(
        claim,
        all(reached),
        f"The best private throughput over plain non-private is {said}; {REACHED} counts as reached",
        study,
    )


def _optimised_beats_per_example(study: Study) -> Finding:
    claim = "Optimised methods cut the cost of per-example clipping on every model."
    pairs = []
    for model in ordered_models(study.ok()):
        records = [r for r in study.ok() if r.model == model and r.case.get("precision") == "fp32"]
        slow = pick(records, "per-example", ("opacus", "torch"))
        fast = [
            r for r in records if r.method in OPTIMISED and not r.unsound and names.engine(r.engine) != "jax"
        ]
        ratios = [v for r in fast if (v := q.ratio(r)) is not None]
        if slow and ratios and (base := q.ratio(slow[0])):
            pairs.append((names.model(model), max(ratios) / base, slow[0].way))
    if not pairs:
        return finding(claim, None, "Per-example clipping or the optimised methods have no result.")
    said = listed(f"{times(gain)} on {model}" for model, gain, _ in pairs)
    return finding(claim, all(gain > 1 for _, gain, _ in pairs), f"Over {pairs[0][2]}: {said}", study)


def fig3(study: Study) -> Shown:
    """How many times as long per-example clipping takes, over model sizes."""
    private = [r for r in study.ok() if r.is_private]
    charts = over_models(
        private,
        "Cost of privacy",
        Axis("time relative to non-private"),
        q.cost,
        q.cost_interval,
        reference=(1.0, "non-private"),
    )
    values = {
        **THROUGHPUT,
        "Times non-private": q.cost,
        "Best non-private": RATIO["Best non-private"],
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values),
        charts,
        (
            _grows_with_size(study, "ViT"),
            _number_on_largest(study, "ViT", paper.VIT_COST),
            _width_not_depth(study),
            _number_on_largest(study, "BiT-ResNet", paper.RESNET_COST),
        ),
        common_note(study),
    )


def _per_example_costs(study: Study, family: str) -> tuple[dict[str, float], str]:
    records = [r for r in study.ok() if names.family(r.model) == family]
    found = [r for m in ordered_models(records) for r in per_example([r for r in records if r.model == m])]
    costs = {m: c for m in ordered_models(found) for r in found if r.model == m and (c := q.cost(r))}
    return costs, found[0].way if found else ""


def _grows_with_size(study: Study, family: str) -> Finding:
    claim = f"The cost of per-example clipping grows with the size of a {family}."
    costs, way = _per_example_costs(study, family)
    if len(costs) < 2:
        return finding(claim, None, "Fewer than two sizes have a result.")
    first, *_, last = costs
    said = listed(f"{times(c)} on {names.model(m)}" for m, c in costs.items())
    return finding(claim, costs[last] > costs[first], f"{way}: {said}", study)


def _number_on_largest(study: Study, family: str, wanted: float) -> Finding:
    claim = f"Per-example clipping costs up to {times(wanted)} on a {family}."
    costs, way = _per_example_costs(study, family)
    if not costs:
        return finding(claim, None, f"No per-example clipping of a {family} has a result.")
    worst = max(costs, key=lambda m: costs[m])
    said = f"{way} costs at most {times(costs[worst])}, on {names.model(worst)}."
    return on_paper_hardware(claim, near(costs[worst], wanted, 0.25), said, study)


def _width_not_depth(study: Study) -> Finding:
    claim = "The width of a ResNet costs more under privacy than its depth."
    costs, way = _per_example_costs(study, "BiT-ResNet")
    sizes = {names.depth_and_width(m): (m, c) for m, c in costs.items() if names.depth_and_width(m)}
    narrow = [s for s in sizes if s and s[1] == min(w for _, w in filter(None, sizes))]
    wider = [s for s in sizes if s and narrow and s[1] > narrow[0][1]]
    deeper = [s for s in narrow if s[0] > min(d for d, _ in narrow)] if narrow else []
    if not wider or not deeper:
        return finding(claim, None, "It needs a wider and a deeper ResNet beside a narrow and shallow one.")
    base = sizes[min(narrow)][1]
    wide, deep = (max(c for s in group for _, c in [sizes[s]]) / base for group in (wider, deeper))
    return finding(
        claim, wide > deep, f"{way}: width multiplies the cost by {wide:.2f}, depth by {deep:.2f}", study
    )


def fig4(study: Study) -> Shown:
    """Throughput as a share of its maximum, over the physical batch."""
    groups = ways(study.ok())
    best = {name: max((v for r in g if (v := q.throughput(r))), default=None) for name, g in groups.items()}

    def share(record: Record) -> float | None:
        value, top = q.throughput(record), best.get(series_name(record))
        return 100 * value / top if value and top else None

    def bounds(record: Record) -> tuple[float, float] | None:
        found, top = q.throughput_interval(record), best.get(series_name(record))
        return (100 * found[0] / top, 100 * found[1] / top) if found and top else None

    chart = Chart(
        "line",
        "A good-enough physical batch",
        Axis("physical batch size (examples)", log=True),
        Axis("share of the highest throughput (%)"),
        lines(study.ok(), lambda r: r.case["batch_size"], share, bounds),
        reference=(90.0, "90 %"),
    )
    always = ("Model", "Library", "Method", "Physical batch")
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, {**THROUGHPUT, "Share of the highest (%)": share}, always),
        (chart,),
        (_half_suffices(study, groups),),
        common_note(study),
    )


def _half_suffices(study: Study, groups: dict[str, list[Record]]) -> Finding:
    claim = "The largest physical batch is not needed: a good-enough one is nearly as fast."
    said, holds = [], []
    for name, group in groups.items():
        sizes = {r.case["batch_size"]: v for r in group if (v := q.throughput(r))}
        if len(sizes) < 3:
            continue
        largest, top = max(sizes), max(sizes.values())
        good = min(size for size, value in sizes.items() if value >= 0.9 * top)
        holds.append(good <= largest / 2)
        said.append(f"{name} {good} of {largest}")
    if not holds:
        return finding(claim, None, "No method has three physical batch sizes with a result.")
    return finding(
        claim, all(holds), f"90 % of the highest throughput is reached at batch {listed(said)}", study
    )


def fig5(study: Study) -> Shown:
    """Throughput at the largest physical batch of each method."""
    ok = study.ok()
    places = list(dict.fromkeys(map(_card, ok)))
    charts = tuple(
        ranking(
            [r for r in ok if _card(r) == place],
            f"Throughput at the largest batch{f', {place}' if len(places) > 1 or place != 'CPU' else ''}",
            Axis("throughput (examples/s)"),
            q.throughput,
            q.throughput_interval,
        )
        for place in places
    )
    values = {
        "Largest batch": lambda r: q.largest(r) or r.case.get("batch_size"),
        **THROUGHPUT,
        "Relative to non-private": lambda r: q.ratio(r) or _over_non_private(r, ok),
    }
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, values, never=("Physical batch",)),
        charts,
        (
            _book_keeping_is_fastest(study),
            _all_beat_per_example(study),
            _a100_over_v100(study, False),
            _a100_over_v100(study, True),
        ),
        common_note(study),
    )


def _card(record: Record) -> str:
    memory = record.case.get("memory_gib")
    return f"{device(record)}, {memory:g} GiB" if memory else device(record)


def _over_non_private(record: Record, records: Sequence[Record]) -> float | None:
    """Of runs that have no baseline beside them, over the non-private record of the same place."""
    same = [r for r in records if r.method == "non-private" and _card(r) == _card(record)]
    bases = [v for r in same if (v := q.throughput(r))]
    own = q.throughput(record)
    return own / max(bases) if own and bases else None


def _by_place(study: Study) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in study.ok():
        found.setdefault(f"{names.model(record.model)}, {_card(record)}", []).append(record)
    return found


def _book_keeping_is_fastest(study: Study) -> Finding:
    claim = "At its largest batch, book-keeping is faster than ghost clipping with a second backward pass."
    said, holds = [], []
    for place, records in _by_place(study).items():
        pairs = [("torch", ("torch",), ("torch",)), ("peers", ("fastdp",), ("private-vision", "opacus"))]
        for _, ours, theirs in pairs:
            kept, ghost = pick(records, BOOK_KEEPING, ours), pick(records, ("ghost", "mixed-ghost"), theirs)
            fast = max((v for r in kept if (v := q.throughput(r))), default=None)
            slow = max((v for r in ghost if (v := q.throughput(r))), default=None)
            if fast and slow:
                holds.append(fast > slow)
                where = f"{names.library(kept[0].engine)} over {names.library(ghost[0].engine)}"
                said.append(f"{times(fast / slow)} ({where}, {place})")
    if not holds:
        return finding(claim, None, "Book-keeping or ghost clipping has no result.")
    return finding(claim, all(holds), f"Book-keeping over ghost clipping: {listed(said)}", study)


def _all_beat_per_example(study: Study) -> Finding:
    claim = "At its largest batch, every optimised method is faster than per-example clipping."
    said, holds = [], []
    for place, records in _by_place(study).items():
        base = pick(records, "per-example", ("opacus", "torch"))
        slow = max((v for r in base if (v := q.throughput(r))), default=None)
        for record in records:
            value = q.throughput(record)
            if slow and value and record.method in OPTIMISED and not record.unsound:
                holds.append(value > slow)
                said.append((value / slow, f"{record.way} {times(value / slow)} ({place})"))
    if not holds:
        return finding(claim, None, "Per-example clipping or the optimised methods have no result.")
    low, high = min(said), max(said)
    evidence = f"From {low[1]} to {high[1]} of the throughput of per-example clipping"
    return finding(claim, all(holds), evidence, study)


def _a100_over_v100(study: Study, per_example: bool) -> Finding:
    wanted = paper.A100_OVER_V100_PER_EXAMPLE if per_example else paper.A100_OVER_V100
    who = "Opacus's per-example clipping" if per_example else "every other method"
    claim = f"An A100 is {times(wanted)} as fast as a V100 for {who}."
    gains = {}
    for name, group in ways(study.ok()).items():
        if (group[0].method == "per-example" and group[0].engine == "opacus") != per_example:
            continue
        cards = {c: v for r in group for c in ("V100", "A100") if c in device(r) and (v := q.throughput(r))}
        if len(cards) == 2:
            gains[name] = cards["A100"] / cards["V100"]
    if not gains:
        return finding(claim, None, "It needs a V100 and an A100.")
    said = listed(f"{name} {times(gain)}" for name, gain in gains.items())
    return finding(claim, all(near(gain, wanted, 0.1) for gain in gains.values()), said)


def fig6(study: Study) -> Shown:
    """Throughput over the physical batch, PyTorch and JAX."""
    chart = Chart(
        "line",
        "Throughput by physical batch",
        Axis("physical batch size (examples)", log=True),
        Axis("throughput (examples/s)"),
        (*lines(study.ok(), _batch, q.throughput, q.throughput_interval), *_baseline_lines(study)),
    )
    always = ("Model", "Library", "Method", "Physical batch")
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, {**THROUGHPUT, **RATIO}, always),
        (chart,),
        (_jax_ahead_of_opacus(study), _book_keeping_close_to_jax(study), _jax_spreads(study)),
        common_note(study),
    )


def _batch(record: Record) -> int:
    return int(record.case["batch_size"])


def _baseline_lines(study: Study) -> tuple[Series, ...]:
    """The best non-private way beside the private ones, where it has no records of its own."""
    made = []
    for engine in names.OURS:
        own = [r for r in study.ok() if r.engine == engine]
        if not own or any(not r.is_private for r in own):
            continue
        best: dict[float, float] = {}
        for record in own:
            if value := q.baseline_throughput(record):
                best[_batch(record)] = max(value, best.get(_batch(record), 0.0))
        if best:
            sizes = tuple(sorted(best))
            style = Look("non-private", *(("dashdot", "square") if engine == "jax" else ()))
            made.append(Series(names.way(engine, "non-private"), sizes, tuple(best[s] for s in sizes), style))
    return tuple(made)


def _at_common_batches(above: Sequence[Record], below: Sequence[Record]) -> dict[int, float]:
    tops, bottoms = ({_batch(r): v for r in group if (v := q.throughput(r))} for group in (above, below))
    return {size: tops[size] / bottoms[size] for size in sorted(tops) if size in bottoms}


def _jax_ahead_of_opacus(study: Study) -> Finding:
    claim = "Per-example clipping in JAX is faster than Opacus's at every physical batch."
    jax = per_example(study.ok(), ("jax", "jax-privacy"))
    opacus = pick(study.ok(), "per-example", ("opacus", "torch"))
    ratios = _at_common_batches(jax, opacus)
    if not ratios:
        return finding(claim, None, "Per-example clipping in JAX or in Opacus has no result.")
    said = listed(f"{ratio:.2f} at batch {size}" for size, ratio in ratios.items())
    evidence = f"{jax[0].way} over {opacus[0].way}: {said}"
    return finding(claim, all(ratio > 1 for ratio in ratios.values()), evidence, study)


def _book_keeping_close_to_jax(study: Study) -> Finding:
    claim = "Book-keeping in PyTorch is close to per-example clipping in JAX."
    jax = per_example(study.ok(), ("jax", "jax-privacy"))
    kept = pick(study.ok(), "bk-ghost", ("fastdp", "torch"))
    ratios = _at_common_batches(kept, jax)
    if not ratios:
        return finding(claim, None, "Book-keeping in PyTorch or per-example clipping in JAX has no result.")
    said = listed(f"{ratio:.2f} at batch {size}" for size, ratio in ratios.items())
    evidence = f"{kept[0].way} over {jax[0].way}: {said}; within 25 % counts as close"
    return finding(claim, all(0.8 <= r <= 1.25 for r in ratios.values()), evidence, study)


def _jax_spreads(study: Study) -> Finding:
    claim = "Throughput in JAX spreads more than in PyTorch."
    spread: dict[str, list[float]] = {"jax": [], "torch": []}
    for record in study.ok():
        found, middle = q.throughput_interval(record), q.throughput(record)
        if found and middle:
            spread[paper.framework(record)].append((found[1] - found[0]) / middle)
    if not all(spread.values()):
        return finding(claim, None, "It needs raw samples of both frameworks.")
    mean = {name: sum(widths) / len(widths) for name, widths in spread.items()}
    said = f"95 % intervals are {percent(mean['jax'])} wide in JAX and {percent(mean['torch'])} in PyTorch"
    return finding(claim, mean["jax"] > mean["torch"], said, study)
