"""Records of measurements, studies, and the metrics of a run."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fuzz import surroundings, trees
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.files import Given, of_json, of_json_lines
from dptrain.bench import Case
from dptrain.bench.record import Record, Records
from dptrain.cli.bench_display import line, show_records
from dptrain.report import build, draw_curves
from dptrain.report.compare import compare
from dptrain.report.errors import ReportError
from dptrain.report.reading import read, read_record
from dptrain.report.studies import in_order, show

_ENVIRONMENT = {
    "commit": "0" * 40,
    "changed_since_commit": False,
    "machine": {"processor": "x", "cores": 2, "gpu": None},
    "threads": 2,
    "python": "3.11",
    "versions": {"torch": "2.15", "jax": "0.10"},
    "date": "2026-01-01",
}


def _race(ratio: float) -> dict[str, Any]:
    def contestant(role: str, rate: float) -> dict[str, Any]:
        samples = [1 / rate * (1 + 0.01 * i) for i in range(6)]
        return {
            "role": role,
            "examples_per_s": rate,
            "samples_s": samples,
            "first_step_s": 2.0,
            "ends_s": [0.01] * 6,
            "peak_bytes": 1e8,
        }

    return {
        "contestants": {"case": contestant("case", 100 * ratio), "eager": contestant("baseline", 100.0)},
        "baseline": "eager",
        "ratio_to_non_private": ratio,
        "interval95_of_ratio": [ratio - 0.01, ratio + 0.01],
        "ratios": [ratio] * 6,
        "examples_per_s": 100 * ratio,
        "exactness": {"verdict": "exact", "largest_error": 1e-12},
        "trains": {"parameters": 10, "skipped": []},
    }


@functools.cache
def cases() -> tuple[Record, ...]:
    """A record for each measure, and failures."""
    found = [
        (Case("throughput", method=method, batch_size=batch), "ok", _race(0.8))
        for method in ("auto", "O-flat", "non-private")
        for batch in (8, 16)
    ]
    found += [
        (
            Case("batch-size", memory_gib=8),
            "ok",
            {"largest": 32, "tries": [{"size": 16, "fits": True}, {"size": 64, "fits": False}]},
        ),
        (
            Case("memory"),
            "ok",
            {
                "peak_bytes": 2**30,
                "ratio_to_non_private": 1.2,
                "anatomy_bytes": {"parameters": 2**20},
                "snapshots_bytes": {"after forward": 2**20},
            },
        ),
        (Case("profile"), "ok", {"sections_s": {"forward": 0.1, "backward": 0.2}, "samples_s": [0.3, 0.3]}),
        (Case("compile"), "ok", {"first_step_s": 3.0, "later_step_s": 0.1, "cached_s": [1.0, 2.0]}),
        (
            Case("accuracy", seeds=3),
            "ok",
            {"mean": 0.9, "accuracies": [0.9, 0.91, 0.89], "interval95": [0.88, 0.92]},
        ),
        (Case("scaling", devices=2), "ok", _race(0.9)),
        (Case("throughput", engine="jax"), "error", {}),
        (Case("throughput", engine="opacus"), "unsupported", {}),
    ]
    return tuple(
        Record(
            case,
            status,
            None if status == "ok" else "It broke.",
            "Traceback ..." if status == "error" else None,
            3.0,
            _ENVIRONMENT,
            {"cpu_share_of_others": 0.0},
            results,
        )
        for case, status, results in found
    )


@functools.cache
def _trees() -> tuple[Any, ...]:
    return tuple(json.loads(json.dumps(record.to_dict())) for record in cases())


def _read_bench(path: Path) -> None:
    """As `dptrain bench` meets a record that is there already, whatever its name says."""
    for case in {record.case for record in cases()}:
        name = Records(path.parent.parent).path(case)
        if not name.is_symlink():
            name.symlink_to(path.name)
    console = Console(file=io.StringIO())
    for record in cases():
        if (found := Records(path.parent.parent).get(record.case)) is not None:
            line(found)
            show_records(console, [found])
            return


def _study(chance: random.Random) -> dict[str, Any]:
    from dptrain.report.studies import STUDIES

    ids = [record.case.id for record in cases()]
    name = chance.choice([*STUDIES, "mine"])
    return {
        "name": name,
        "title": "A study",
        "shows": "x",
        "scale": "small",
        "cases": ids,
        "curves": [[0, 1], [1, 2]],
    }


def _folder(chance: random.Random) -> list[tuple[str, Given]]:
    """Files of a folder of records and a study, of which some are changed."""
    chosen = chance.sample(_trees(), chance.choice((1, 3, 6)))
    hurt = chance.randrange(len(chosen) + 1)
    files = []
    for number, tree in enumerate(chosen):
        content = json.dumps(tree).encode()
        if number == hurt:
            content = trees.encoded(chance, trees.changed(chance, tree))
        kind = surroundings.kind(chance) if chance.random() < 0.1 else "file"
        files.append((f"records/{number}.json", (kind, content)))
    study = _study(chance)
    content = json.dumps(study).encode()
    if hurt == len(chosen):
        content = trees.encoded(chance, trees.changed(chance, study))
    return [*files, ("studies/one.json", ("file", content))]


def _put(files: list[tuple[str, Given]], scratch: Path) -> Path:
    folder = scratch / "results"
    surroundings.remove(folder)
    folder.mkdir()
    for name, (kind, content) in files:
        surroundings.put(folder / name, content, kind)
    return folder


def _feed_shown(files: list[tuple[str, Given]], scratch: Path) -> None:
    for study in in_order(read(_put(files, scratch)).studies):
        show(study)


def _feed_built(files: list[tuple[str, Given]], scratch: Path) -> None:
    build(_put(files, scratch), ("md", "csv", "tex", "html"))


def _feed_drawn(files: list[tuple[str, Given]], scratch: Path) -> None:
    build(_put(files, scratch), ("png",))


def _two(chance: random.Random) -> tuple[Given, Given]:
    tree = chance.choice(_trees())
    return ("file", json.dumps(tree).encode()), ("file", trees.mixed(chance, [tree]))


def _feed_compared(given: tuple[Given, Given], scratch: Path) -> None:
    for name, (kind, content) in zip("ab", given):
        surroundings.put(scratch / name, content, kind)
    compare(read_record(scratch / "a"), read_record(scratch / "b"))


_METRICS = (
    {
        "event": "evaluation",
        "step": 3,
        "epsilon": 1.5,
        "on": "test",
        "accuracy": 0.5,
        "loss": 1.0,
        "elapsed_s": 2.0,
    },
    {
        "event": "unprotected",
        "step": 3,
        "mean_loss": 1.0,
        "median_norm": 0.1,
        "clipped_share": 0.5,
        "batch_size": 7,
    },
    {
        "event": "evaluation",
        "step": 4,
        "epsilon": None,
        "on": "test",
        "accuracy": 0.6,
        "loss": 1.0,
        "elapsed_s": 2.0,
    },
)

TARGETS = (
    Target("report-folder", _folder, _feed_shown, (ReportError,), 60),
    Target("report-build", _folder, _feed_built, (ReportError,), 5),
    Target("report-draw", _folder, _feed_drawn, (ReportError,), 1),
    Target("report-compare", _two, _feed_compared, (ReportError,), 100),
    of_json("bench-record", "records/x.json", _trees(), _read_bench, (), 300),
    of_json_lines(
        "metrics",
        "metrics.jsonl",
        _METRICS,
        lambda path: draw_curves(path, path.with_name("curves.png")),
        (ReportError,),
        12,
    ),
)
