"""What there is and how it is set: Tables A1 and A2, and the workers of the loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dptrain.report import names, palette
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
    rows_table,
    series,
    table,
    ways,
)
from dptrain.report.studies.cost import THROUGHPUT

YES, NO = "✓", "–"


def table_a1(study: Study) -> Shown:
    """Which library does which method, by model, as measured."""
    engines = [e for e in names.LIBRARIES if any(r.engine == e for r in study.records)]
    engines += sorted({r.engine for r in study.records} - set(engines))
    libraries = {e: names.LIBRARIES.get(e, e) for e in engines}
    order = {m: place for place, m in enumerate(names.METHODS)}
    pairs = {(r.model, r.method) for r in study.records}
    rows = [
        {"Model": names.model(model), "Method": method}
        | {
            libraries[e]: _cell(
                [r for r in study.records if (r.model, r.engine, r.method) == (model, e, method)]
            )
            for e in engines
        }
        | {"Paper": listed(names.LIBRARIES[e] for e, known in paper.SUPPORT.items() if method in known) or NO}
        for model, method in sorted(
            pairs, key=lambda p: (names.model_rank(p[0]), p[0], order.get(p[1], len(order)))
        )
    ]
    said = [r for r in study.records if not r.ok and not _absent(r)]
    failed = dict.fromkeys(f"{r.way} on {names.model(r.model)}: {r.sentence or r.status}" for r in said)
    absent = dict.fromkeys(f"{r.way}: {r.sentence}" for r in study.records if _absent(r))
    key = f"{YES}: works and clips exactly. {NO}: not tried. Paper: the libraries that have the method there."
    return Shown(
        study.name,
        study.title,
        study.shows,
        rows_table(rows, ["Model", "Method", *libraries.values(), "Paper"]),
        (),
        (_as_in_the_paper(study), _no_standardised_weights(study)),
        (*common_note(study), key, *failed, *absent),
    )


def _absent(record: Record) -> bool:
    """Whether the library is not there, which says nothing of what it does."""
    return record.status == "unsupported" and "install" in (record.sentence or "").lower()


def _cell(records: Sequence[Record]) -> str:
    if not records:
        return NO
    words = []
    for record in records:
        if record.ok:
            words.append(f"{YES} but {record.unsound}" if record.unsound else YES)
        else:
            words.append("not installed" if _absent(record) else record.status)
    return ", ".join(dict.fromkeys(words))


def _as_in_the_paper(study: Study) -> Finding:
    claim = "Every library does the methods on a ViT that the paper's Table A1 gives it."
    works, broken, absent = [], [], []
    for engine, methods in paper.SUPPORT.items():
        tried = [
            r
            for r in study.records
            if names.family(r.model) == "ViT"
            and r.engine.removesuffix("-privacy") == engine
            and (r.method in methods or (engine == "jax" and r.method == "per-example-vmap"))
        ]
        there = [r for r in tried if not _absent(r)]
        works += [r.way for r in there if r.ok]
        broken += [r.way for r in there if not r.ok]
        # Non-private PyTorch takes part in every measurement, as the baseline.
        if not there and engine != "torch":
            absent.append(names.LIBRARIES[engine])
    if broken:
        return finding(claim, False, f"There is no result of {listed(dict.fromkeys(broken))}", study)
    done = listed(dict.fromkeys(works), 10)
    if absent:
        why = f"Not tried or not installed: {listed(absent)}."
        return finding(claim, None, f"{why} These work: {done}." if works else why)
    return finding(claim, True, f"These work: {done}", study)


def _no_standardised_weights(study: Study) -> Finding:
    claim = "Private Vision and FastDP do not support BiT-ResNet, whose weights are standardised."
    tried = [
        r
        for r in study.records
        if names.family(r.model) == "BiT-ResNet"
        and r.engine in ("private-vision", "fastdp")
        and not _absent(r)
    ]
    if not tried:
        return finding(claim, None, "Neither was tried on a BiT-ResNet, or they are not installed.")
    said = listed(f"{r.way}: {r.unsound or r.sentence or 'works' if r.ok else r.status}" for r in tried)
    return finding(claim, all(not r.ok or r.unsound for r in tried), said, study)


def table_a2(study: Study) -> Shown:
    """The hyperparameters of the paper, and those of the runs here."""
    labels = {
        "trainable": "Trainable parameters",
        "epsilon": "Epsilon",
        "delta": "Delta",
        "lr": "Learning rate",
        "clip_norm": "Clip norm",
    }
    rows: list[dict[str, Any]] = [
        {"Model": family, "Source": "paper"}
        | {label: wanted[key] for key, label in labels.items()}
        | {"Status": ""}
        for family, wanted in paper.HYPERPARAMETERS.items()
    ]
    for record in study.records:
        said = record.setting
        rows.append(
            {"Model": names.model(record.model), "Source": "here"}
            | {label: said.get(key) for key, label in labels.items()}
            | {
                "Test accuracy here": q.accuracy(record),
                "Status": record.status + (f": {record.sentence}" if record.sentence else ""),
            }
        )
    return Shown(
        study.name,
        study.title,
        study.shows,
        rows_table(rows, ["Model", "Source", *labels.values(), "Test accuracy here", "Status"]),
        (),
        (_settings_agree(study),),
        common_note(study),
    )


def _settings_agree(study: Study) -> Finding:
    claim = "The runs here have the hyperparameters of the paper's Table A2."
    compared, different = 0, []
    for record in study.records:
        wanted = paper.HYPERPARAMETERS.get(names.family(record.model))
        if wanted is None:
            continue
        for key, value in record.setting.items():
            if key in wanted:
                compared += 1
                if value != wanted[key]:
                    different.append(f"{key} {value} instead of {wanted[key]} ({names.model(record.model)})")
    if not compared:
        return finding(claim, None, "No run of a ViT or a BiT-ResNet says its hyperparameters.")
    if different:
        return finding(claim, False, f"{listed(different)}.", study)
    return finding(claim, True, f"{compared} settings agree.")


def workers(record: Record) -> int | None:
    """Processes of the loader."""
    for name in ("workers", "num_workers", "n_workers", "loader_workers"):
        if (value := q.number(record.setting.get(name))) is not None:
            return int(value)
    return None


def loader_workers(study: Study) -> Shown:
    """How much of a step the loading of data takes, over the physical batch; or throughput by workers."""
    profiles = study.ok("profile")
    numbers = sorted({w for r in study.ok() if (w := workers(r)) is not None})
    batch = Axis("physical batch size (examples)", log=True)
    by_workers = tuple(
        series(
            f"{n} worker{'s' * (n != 1)}",
            sorted((r for r in study.ok() if workers(r) == n), key=_batch),
            _batch,
            q.throughput,
            palette.step(i, len(numbers)),
            q.throughput_interval,
        )
        for i, n in enumerate(numbers)
    )
    charts = (
        Chart(
            "line", "Loading", batch, Axis("share of data in a step (%)"), lines(profiles, _batch, _loading)
        ),
        Chart("line", "Throughput by loader workers", batch, Axis("throughput (examples/s)"), by_workers),
    )
    values = {
        "Data (ms)": lambda r: _scaled(q.sections(r).get("data"), 1000),
        "Step (ms)": lambda r: _scaled(sum(q.sections(r).values()) or None, 1000),
        "Data (%)": _loading,
        **THROUGHPUT,
    }
    found = table(study, values, ("Model", "Library", "Method", "Physical batch"), also={"Workers": workers})
    empty = [c for c in values if len(found) and found[c].isna().all()]
    judged = _small_batches_gain_most(study, numbers) if numbers else _small_batches_wait_most(study)
    return Shown(
        study.name,
        study.title,
        study.shows,
        found.drop(columns=empty),
        charts,
        (judged,),
        common_note(study),
    )


def _batch(record: Record) -> int:
    return int(record.case["batch_size"])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _loading(record: Record) -> float | None:
    """Per cent of a step in which data is waited for."""
    found = q.sections(record)
    total = sum(found.values())
    return 100 * found["data"] / total if total and "data" in found else None


def _small_batches_wait_most(study: Study) -> Finding:
    claim = "Loading limits small physical batches more than large ones."
    said, holds = [], []
    for name, group in ways(study.ok("profile")).items():
        shares = {_batch(r): v for r in sorted(group, key=_batch) if (v := _loading(r)) is not None}
        if len(shares) > 1:
            (small, a), *_, (large, b) = shares.items()
            holds.append(a > b and a >= 1)
            said.append(f"{a:.2g} % at batch {small} and {b:.2g} % at {large} for {name}")
    if not holds:
        return finding(claim, None, "No method has results at two physical batch sizes.")
    return finding(
        claim, all(holds), f"Data takes {listed(said)} of a step; less than 1 % limits nothing", study
    )


def _small_batches_gain_most(study: Study, numbers: Sequence[int]) -> Finding:
    claim = "Loading limits small physical batches: more workers help them more than large ones."
    if len(numbers) < 2:
        return finding(claim, None, "It needs two numbers of workers.")
    few, many = numbers[0], numbers[-1]
    rates = {(workers(r), r.case["batch_size"]): v for r in study.ok() if (v := q.throughput(r))}
    sizes = sorted(size for n, size in rates if n == few and (many, size) in rates)
    if len(sizes) < 2:
        return finding(claim, None, "It needs two physical batch sizes with few and with many workers.")
    gains = [rates[many, size] / rates[few, size] for size in (sizes[0], sizes[-1])]
    more, much = (f"{percent(gain - 1)} at batch {size}" for gain, size in zip(gains, (sizes[0], sizes[-1])))
    said = f"{many} instead of {few} workers change throughput by {more} and {much}"
    return finding(claim, gains[0] > max(gains[1], 1.03), f"{said}; less than 3 % is no help", study)
