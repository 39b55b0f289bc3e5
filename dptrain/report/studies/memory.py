"""What fits: Figure 2, Tables 1 and 2, and the memory of ml-privacy-exp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dptrain.report import names
from dptrain.report import quantities as q
from dptrain.report.palette import look
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series, Shown
from dptrain.report.studies import paper
from dptrain.report.studies.common import (
    common_note,
    finding,
    listed,
    near,
    on_paper_hardware,
    ordered_models,
    over_models,
    per_example,
    pick,
    ranking,
    rows_table,
    series_name,
    status,
    table,
    times,
    ways,
)
from dptrain.report.studies.cost import BOOK_KEEPING

BATCH = {
    "Largest batch": q.largest,
    "Limit (GiB)": lambda r: _scaled(q.result(r, "limit_bytes"), q.GIB),
    "Examples/s there": q.throughput,
}


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def fig2(study: Study) -> Shown:
    """The largest physical batch over model sizes."""
    charts = over_models(
        study.ok(),
        "Largest physical batch",
        Axis("largest physical batch (examples)", log=True),
        lambda r: q.largest(r) or None,  # of 0 there is no logarithm
    )
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, BATCH, never=("Physical batch",)),
        charts,
        (*(_gap_grows(study, f) for f in ("ViT", "BiT-ResNet")), _gap_at_huge(study)),
        common_note(study),
    )


def _gaps(study: Study, family: str) -> dict[str, tuple[float, float]]:
    """Of each model, the largest batch without privacy and with per-example clipping."""
    found = {}
    for model in ordered_models(r for r in study.ok() if names.family(r.model) == family):
        own = [r for r in study.ok() if r.model == model]
        plain, private = pick(own, "non-private"), per_example(own)
        if plain and private and (a := q.largest(plain[0])) and (b := q.largest(private[0])):
            found[model] = (a, b)
    return found


def _gap_grows(study: Study, family: str) -> Finding:
    claim = f"The gap in the largest batch grows with the size of a {family}."
    gaps = _gaps(study, family)
    if len(gaps) < 2:
        return finding(claim, None, "Fewer than two sizes have a result without and with privacy.")
    ratios = [a / b for a, b in gaps.values()]
    said = listed(f"{times(a / b)} on {names.model(m)} ({a:,.0f} to {b:,.0f})" for m, (a, b) in gaps.items())
    return finding(claim, ratios[-1] > ratios[0], said, study)


def _gap_at_huge(study: Study) -> Finding:
    claim = "At ViT-Huge non-private training fits 11 times the batch of per-example clipping, which fits 3."
    gap = _gaps(study, "ViT").get("vit-huge")
    if gap is None:
        return finding(claim, None, "ViT-Huge has no result without and with privacy.")
    plain, private = gap
    said = f"{plain:,.0f} to {private:,.0f} examples, {times(plain / private)}."
    return on_paper_hardware(claim, near(plain / private, paper.HUGE_BATCH_GAP, 0.25), said, study)


def table1(study: Study) -> Shown:
    """Numbers of parameters, as counted by the recipe or as the records have them."""
    counted = study.extra.get("parameters")
    counted = counted if isinstance(counted, Mapping) else {}
    millions = {str(m): n / 1e6 for m, raw in counted.items() if (n := q.number(raw))}
    for record in study.records:
        if record.model not in millions and (found := parameters(record)):
            millions[record.model] = found
    models = sorted({*millions, *(r.model for r in study.records)}, key=lambda m: (names.model_rank(m), m))
    rows = [
        {
            "Model": names.model(m),
            "Parameters (millions)": millions.get(m),
            "Paper (millions)": paper.PARAMETERS_M.get(m),
            "Status": "ok" if m in millions else "; ".join(status(r) for r in study.records if r.model == m),
        }
        for m in models
    ]
    known = [m for m in models if m in millions]
    bars = Series(
        "parameters",
        tuple(map(names.model, known)),
        tuple(millions[m] for m in known),
        Look("step-3"),
    )
    return Shown(
        study.name,
        study.title,
        study.shows,
        rows_table(rows, ["Model", "Parameters (millions)", "Paper (millions)", "Status"]),
        (Chart("ranking", "Parameters", Axis(""), Axis("parameters (millions)"), (bars,)),),
        (_parameters_agree(millions),),
        ("The size of the head depends on the number of classes.",),
    )


def parameters(record: Record) -> float | None:
    """Millions of parameters, from the count that the record holds or from their float32 bytes."""
    for path in (("parameters",), ("trains", "scalars"), ("trains", "of")):
        # A number of tensors is not one of parameters: no model here has fewer than 10,000 of these.
        if (count := q.result(record, *path)) and count > 10_000:
            return count / 1e6
    size = q.result(record, "anatomy_bytes", "parameters")
    return size / 4 / 1e6 if size else None


def _parameters_agree(millions: Mapping[str, float]) -> Finding:
    claim = "The models have the numbers of parameters of the paper's Table 1."
    pairs = {m: paper.PARAMETERS_M[m] for m in paper.PARAMETERS_M if m in millions}
    if not pairs:
        return finding(claim, None, "None of the paper's models was counted.")
    said = listed(
        (f"{names.model(m)} {millions[m]:.1f} ({wanted:.1f})" for m, wanted in pairs.items()), most=10
    )
    holds = all(near(millions[m], wanted, 0.05) for m, wanted in pairs.items())
    return finding(claim, holds, f"Millions, the paper's in brackets, 5 % are allowed for the head: {said}.")


def table2(study: Study) -> Shown:
    """The largest physical batch of each method."""
    budgets = sorted({float(b) for r in study.ok() if (b := r.case.get("memory_gib"))})
    groups = [[r for r in study.ok() if r.case.get("memory_gib") == b] for b in budgets] or [study.ok()]
    charts = tuple(
        ranking(
            group,
            "Largest physical batch" + (f", {budgets[i]:g} GiB" if budgets else ""),
            Axis("largest physical batch (examples)", log=True),
            q.largest,
        )
        for i, group in enumerate(groups)
    )
    also = {
        "Paper, V100": lambda r: paper.LARGEST_BATCH.get(r.method, (None, None))[0],
        "Paper, A100": lambda r: paper.LARGEST_BATCH.get(r.method, (None, None))[1],
    }
    always = ("Model", "Library", "Method", "Memory (GiB)")
    return Shown(
        study.name,
        study.title,
        study.shows,
        table(study, {"Largest batch": q.largest}, always, ("Physical batch",), also),
        charts,
        tuple(
            judge(study)
            for judge in (_far_more_than_per_example, _ghost_closest, _mixing_changes_nothing, _paper_batches)
        ),
        (*common_note(study), "The paper's numbers: ViT-Base on V100 (32 GB) and A100 (40 GB)."),
    )


def _budgets(study: Study) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in study.ok():
        memory = record.case.get("memory_gib")
        where = names.model(record.model) + (f" in {memory:g} GiB" if memory else "")
        found.setdefault(where, []).append(record)
    return found


def _most(records: Sequence[Record]) -> float | None:
    return max((v for r in records if (v := q.largest(r))), default=None)


def _far_more_than_per_example(study: Study) -> Finding:
    claim = "Ghost clipping and book-keeping fit several times the batch of per-example clipping."
    said, holds = [], []
    for where, records in _budgets(study).items():
        base = _most(pick(records, "per-example", ("opacus", "torch")))
        methods = ("ghost", "mixed-ghost", *BOOK_KEEPING)
        others = [v for r in records if r.method in methods and not r.unsound and (v := q.largest(r))]
        if base and others:
            holds.append(min(others) >= 2 * base)
            said.append(f"{times(min(others) / base)} to {times(max(others) / base)} for {where}")
    if not holds:
        return finding(claim, None, "Per-example clipping or the others have no result.")
    return finding(claim, all(holds), f"{listed(said)}; ×2 counts as several", study)


def _ghost_closest(study: Study) -> Finding:
    claim = "Ghost clipping comes closest to the non-private batch, and book-keeping fits a little less."
    said, holds = [], []
    for where, records in _budgets(study).items():
        plain = _most(pick(records, "non-private"))
        for ghosts, keepers in ((("torch",), ("torch",)), (("private-vision", "opacus"), ("fastdp",))):
            ghost = _most(pick(records, ("ghost", "mixed-ghost"), ghosts))
            kept = _most(pick(records, BOOK_KEEPING, keepers))
            if plain and ghost and kept:
                holds.append(plain >= ghost >= kept)
                names_ = f"{names.library(ghosts[0])}, {where}"
                said.append(f"{ghost / plain:.2f} against {kept / plain:.2f} of non-private ({names_})")
    if not holds:
        return finding(claim, None, "Non-private, ghost clipping or book-keeping has no result.")
    return finding(claim, all(holds), listed(said), study)


def _mixing_changes_nothing(study: Study) -> Finding:
    claim = "On a ViT, mixed ghost clipping fits the same batch as ghost clipping."
    said, holds = [], []
    for where, records in _budgets(study).items():
        if not where.startswith("ViT"):
            continue
        for engine in ("torch", "private-vision"):
            ghost, mixed = (_most(pick(records, m, (engine,))) for m in ("ghost", "mixed-ghost"))
            if ghost and mixed:
                holds.append(near(mixed, ghost, 0.05))
                said.append(f"{mixed:,.0f} and {ghost:,.0f} ({names.library(engine)}, {where})")
    if not holds:
        return finding(claim, None, "Mixed ghost clipping or ghost clipping of a ViT has no result.")
    return finding(claim, all(holds), listed(said), study)


def _paper_batches(study: Study) -> Finding:
    claim = (
        "The largest batches are those of the paper: 216/268 non-private, 28/35 per-example, 203/257 ghost."
    )
    cards = {32: 0, 40: 1}
    said, holds = [], []
    for record in study.ok():
        wanted = paper.LARGEST_BATCH.get(record.method)
        card = cards.get(round(record.case.get("memory_gib") or 0))
        found = q.largest(record)
        if wanted and card is not None and found and record.model == "vit-base":
            holds.append(near(found, wanted[card], 0.1))
            said.append(f"{series_name(record)} {found:,.0f} ({wanted[card]})")
    if not holds:
        return finding(claim, None, "It needs ViT-Base within 32 and 40 GiB of a GPU (--scale paper).")
    return on_paper_hardware(claim, all(holds), f"The paper's in brackets: {listed(said, 8)}.", study)


def dp_memory(study: Study) -> Shown:
    """Peak memory, what it is made of, and how it goes through a step."""
    ok = study.ok("memory") or study.ok()
    parts = list(dict.fromkeys(p for r in ok for p in r.results.get("anatomy_bytes") or {}))
    values = {
        "Peak (MiB)": lambda r: _scaled(q.result(r, "peak_bytes"), q.MIB),
        "Non-private peak (MiB)": lambda r: _scaled(q.result(r, "baseline_peak_bytes"), q.MIB),
        "Times non-private": _memory_ratio,
        **{
            f"{part.capitalize()} (MiB)": lambda r, p=part: _scaled(q.result(r, "anatomy_bytes", p), q.MIB)
            for part in parts
        },
        "Largest batch": q.largest,
    }
    found = table(study, values)
    return Shown(
        study.name,
        study.title,
        study.shows,
        found.dropna(axis="columns", how="all") if len(found) else found,
        (_anatomy_chart(ok, parts), _snapshots_chart(ok)),
        (_several_times_the_memory(study), _mixed_ghost_between(study)),
        (
            *common_note(study),
            "ml-privacy-exp on one 1080Ti, VGG11: 1,425 MB without and 10,261 MB with privacy; "
            "largest batch 8,625, 100 (per-example) and 3,500 (mixed ghost).",
        ),
    )


def _memory_ratio(record: Record) -> float | None:
    if found := q.result(record, "ratio_to_non_private"):
        return found
    own, base = q.result(record, "peak_bytes"), q.result(record, "baseline_peak_bytes")
    return own / base if own and base else None


def _anatomy_chart(records: Sequence[Record], parts: Sequence[str]) -> Chart:
    return Chart(
        "bar",
        "What the memory is made of",
        Axis("", categories=tuple(parts)),
        Axis("memory (MiB)"),
        _by_name(records, "anatomy_bytes"),
    )


def _snapshots_chart(records: Sequence[Record]) -> Chart:
    moments = tuple(dict.fromkeys(m for r in records for m in r.results.get("snapshots_bytes") or {}))
    return Chart(
        "line",
        "Memory in use through a step",
        Axis("", categories=moments),
        Axis("memory (MiB)"),
        _by_name(records, "snapshots_bytes"),
    )


def _by_name(records: Sequence[Record], field: str) -> tuple[Series, ...]:
    """A series for each way of training, of one model: the one that has most of them."""
    models = [r.model for r in records]
    main = max(models, key=models.count) if models else ""
    made = []
    for name, group in ways(r for r in records if r.model == main).items():
        sizes = {
            k: v for k, raw in (group[0].results.get(field) or {}).items() if (v := q.number(raw)) is not None
        }
        if sizes:
            own = look(group[0].engine, group[0].method, bool(group[0].unsound))
            made.append(Series(name, tuple(sizes), tuple(v / q.MIB for v in sizes.values()), own))
    return tuple(made)


def _several_times_the_memory(study: Study) -> Finding:
    claim = "Per-example clipping needs several times the memory of non-private training (×7.2 for VGG11)."
    found = per_example(study.ok("memory"))
    ratios = [(r, v) for r in found if (v := _memory_ratio(r))]
    if not ratios:
        return finding(claim, None, "The memory of per-example clipping has no result.")
    said = listed(f"{times(v)} on {names.model(r.model)}" for r, v in ratios)
    return finding(
        claim, all(v >= 2 for _, v in ratios), f"{found[0].way}: {said}; ×2 counts as several", study
    )


def _mixed_ghost_between(study: Study) -> Finding:
    claim = "Mixed ghost clipping needs less memory than per-example clipping, or fits a larger batch."
    said, holds = [], []
    for model in ordered_models(study.ok()):
        own = [r for r in study.ok() if r.model == model]
        for engines in (("torch",), ("private-vision", "fastdp")):
            mixed = pick(own, ("mixed-ghost", "bk-mixed-ghost"), engines)
            slow = per_example(own, ("torch",) if engines == ("torch",) else ("opacus",))
            for quantity, sign, unit in (("peak_bytes", 1, "memory"), ("largest", -1, "batch")):
                a = [v for r in mixed if (v := q.result(r, quantity))]
                b = [v for r in slow if (v := q.result(r, quantity))]
                if a and b:
                    ratio = min(a) / min(b) if sign > 0 else max(a) / max(b)
                    holds.append(ratio < 1 if sign > 0 else ratio > 1)
                    said.append(f"{times(ratio)} the {unit} of {slow[0].way} on {names.model(model)}")
    if not holds:
        return finding(claim, None, "Mixed ghost clipping or per-example clipping has no result.")
    return finding(claim, all(holds), listed(said), study)
