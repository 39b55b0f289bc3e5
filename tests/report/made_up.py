"""Made-up records: plausible ones, for every study, and a folder of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.report import Record, Study

VITS = ("vit-tiny", "vit-small", "vit-base")
BITS = ("bit-50x1", "bit-101x1", "bit-50x3")
SPEED = {
    "non-private": 1.0,
    "per-example": 0.45,
    "per-example-vmap": 0.4,
    "ghost": 0.7,
    "mixed-ghost": 0.7,
    "bk-ghost": 0.8,
    "bk-mixed-ghost": 0.79,
    "bk-mix-opt": 0.81,
    "auto": 0.97,
}
LIBRARY = {
    "per-example": "opacus",
    "ghost": "private-vision",
    "mixed-ghost": "private-vision",
    "bk-ghost": "fastdp",
    "bk-mixed-ghost": "fastdp",
    "bk-mix-opt": "fastdp",
}
ENVIRONMENT = {
    "commit": "e34a670aa0",
    "changed_since_commit": False,
    "versions": {"torch": "2.15.0", "jax": "0.10.2", "numpy": "2.4.6"},
    "python": "3.11.7",
    "machine": {"processor": "AMD EPYC", "cores": 2, "gpu": None},
    "threads": 2,
    "date": "2026-11-21",
}


def record(
    results: dict[str, Any] | None = None,
    status: str = "ok",
    sentence: str | None = None,
    environment: dict[str, Any] | None = None,
    **case: Any,
) -> Record:
    """A record of a case that differs from the usual one as said."""
    usual = {
        "measure": "throughput",
        "engine": "torch",
        "method": "auto",
        "model": "vit-tiny",
        "image_size": 64,
        "num_classes": 100,
        "batch_size": 16,
        "accumulate": 4,
        "precision": "fp32",
        "compile": False,
        "channels_last": False,
        "device": "cpu",
        "devices": 1,
        "memory_gib": None,
        "budget_mib": None,
        "seconds": 10.0,
        "seeds": 1,
        "settings": [],
    } | case
    digest = hashlib.sha256(json.dumps(usual, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{usual['measure']}-{usual['engine']}-{usual['method']}-{usual['model']}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name) + f"-{digest}"
    trace = "Traceback (most recent call last):\n  ValueError" if status == "error" else None
    found = environment if environment is not None else ENVIRONMENT
    return Record(name, usual, status, sentence, trace, 12.0, found, {}, results or {})


def race(
    speed: float, base: float = 100.0, noise: float = 0.01, seed: int = 0, rounds: int = 15, **case: Any
) -> Record:
    """A measured throughput: `speed` times that of the baseline, which is `base` examples per second."""
    batch, times = case.get("batch_size", 16), case.get("accumulate", 4)
    devices = case.get("devices", 1)
    rng = np.random.default_rng(seed)

    def contestant(role: str, rate: float) -> dict[str, Any]:
        step = batch * devices / rate
        samples = {
            "raw_first_physical_step_s": step * (1 + noise * rng.standard_normal(rounds)),
            "raw_later_physical_step_s": step * (1 + noise * rng.standard_normal(rounds)),
            "raw_end_of_logical_step_s": 0.01 * step * (1 + noise * rng.standard_normal(rounds)),
        }
        lists = {name: values.tolist() for name, values in samples.items()}
        return {"role": role, "status": "ok", **lists, "examples_per_s": rate, "logical_step_s": times * step}

    private = case.get("method", "auto") != "non-private"
    results = {
        "contestants": {
            "case": contestant("case", base * speed),
            "non-private eager": contestant("baseline", 0.96 * base),
            "non-private compiled": contestant("baseline", base),
        },
        "baseline": "non-private compiled",
        "examples_per_s": base * speed,
        "ratio_to_non_private": speed,
        "quartiles_of_paired_ratios": [0.99 * speed, 1.01 * speed],
        "interval95_of_ratio": [0.985 * speed, 1.015 * speed],
        "exactness": {"verdict": "exact" if private else "non-private", "error_of_sum": 1e-7},
        "trains": {"parameters": 152, "of": 152, "skipped": []},
    }
    return record(results, **case)


def fits(largest: int, rate: float = 100.0, **case: Any) -> Record:
    """A largest physical batch."""
    tries = [
        {"batch_size": largest, "status": "ok", "peak_bytes": 10**9, "physical_step_s": 0.1},
        {"batch_size": largest + 1, "status": "out-of-memory", "peak_bytes": None, "physical_step_s": None},
    ]
    found = {"largest": largest, "limit_bytes": 2**31, "tries": tries, "examples_per_s": rate}
    return record(found, measure="batch-size", **({"memory_gib": 2.0} | case))


def profile(backward: float = 0.4, **case: Any) -> Record:
    """Sections of a step."""
    base = {"data": 0.002, "forward": 0.08, "backward": 0.16, "optimizer step": 0.01, "other": 0.001}
    own = base | {
        "forward": 0.09,
        "backward": backward,
        "norms": 0.02,
        "clip and accumulate": 0.03,
        "noise": 0.004,
    }
    raw = {name: [v, 1.01 * v, 0.99 * v] for name, v in own.items()}
    found = {"sections_s": own, "baseline_sections_s": base, "raw_sections_s": raw, "traces": ["a.json"]}
    return record(found, measure="profile", **case)


def memory(times: float = 3.0, **case: Any) -> Record:
    """Peak memory and its anatomy."""
    parts = {
        "parameters": 22e6,
        "gradients": 22e6,
        "activations": 3e8,
        "per-example gradients": 4e8 * (times - 1),
    }
    moments = {"after gradient": 4e8, "after clip": 5e8 * times, "after noise": 4e8, "after step": 1e8}
    found = {
        "peak_bytes": 5e8 * times,
        "baseline_peak_bytes": 5e8,
        "ratio_to_non_private": times,
        "anatomy_bytes": {k: int(v) for k, v in parts.items()},
        "snapshots_bytes": {k: int(v) for k, v in moments.items()},
    }
    return record(found, measure="memory", **case)


def compiled(seconds: float, **case: Any) -> Record:
    """A compile time."""
    later = [0.5, 0.52, 0.49, 0.5, 0.51]
    found = {
        "first_step_s": seconds + 0.5,
        "later_step_s": 0.5,
        "compile_s": seconds,
        "raw_later_step_s": later,
    }
    return record(found, measure="compile", **({"engine": "jax"} | case))


def trained(mean: float, seconds: float = 60.0, spread: float = 0.005, **case: Any) -> Record:
    """Accuracies of three runs."""
    found = {
        "accuracies": [mean - spread, mean, mean + spread],
        "epsilons": [8.0, 8.0, 8.0],
        "raw_seconds": [seconds, 1.01 * seconds, 0.99 * seconds],
        "mean": mean,
        "interval95": [mean - spread, mean + spread],
    }
    settings = [["epsilon", 8], ["delta", 2.04e-5], ["lr", 0.0003], ["clip_norm", 4.63]]
    return record(found, measure="accuracy", **({"seeds": 3, "settings": settings} | case))


def compared(corrected: float = 0.93) -> list[Record]:
    """Optimizers: two of Adam, of which one is averaged, and SGD with and without a filter."""
    kinds = (
        ({"optimizer": "adam", "weight_average": 0.0}, 0.9),
        ({"optimizer": "adam", "weight_average": 0.95}, 0.94),
        ({"optimizer": "adam-bc", "weight_average": 0.0}, corrected),
        ({"optimizer": "sgd", "weight_average": 0.0}, 0.92),
        ({"optimizer": "sgd", "weight_average": 0.0, "denoise": 0.5}, 0.921),
    )
    return [
        trained(mean, model="mlp", settings=[[k, v] for k, v in (settings | {"lr": 0.1}).items()])
        for settings, mean in kinds
    ]


def compressed(mean: float, guarantee: bool = True, released: int = 1000, **settings: Any) -> Record:
    """Training on MNIST with accuracies over time."""
    private = settings.pop("method", "auto")
    steps = (50, 100, 150, 200, 250)
    run = [
        {
            "step": step,
            "epochs": step / 234,
            "epsilon": 0.1 * step**0.5 if guarantee else None,
            "accuracy": mean * (1 - 2 ** (-step / 40)),
        }
        for step in steps
    ]
    found = {
        "accuracies": [mean],
        "epsilons": [1.58] if guarantee else [None],
        "guarantee": guarantee,
        "bytes_per_step": {"sum_bytes": 104_040, "release_bytes": released, "dense_bytes": 104_040},
        "curves": [run],
        "raw_seconds": [60.0],
        "mean": mean,
        "interval95": None,
    }
    return record(
        found, measure="accuracy", model="lenet", method=private, settings=[list(s) for s in settings.items()]
    )


def _compressions() -> list[Record]:
    public = {"compress": "public-topk", "public_examples": 600}
    return [
        compressed(0.9, released=104_040),
        compressed(0.7, compress="topk"),
        compressed(0.95, guarantee=False, compress="topk", method="non-private"),
        compressed(0.8, **public),
        compressed(0.85, **public, compress_before_clipping=True),
        compressed(0.87, **public, compress_before_clipping=True, clip_norm=0.25),
        compressed(0.86, guarantee=False, compress="leaky-topk-no-guarantee"),
    ]


def _momenta() -> list[Record]:
    made = [compressed(0.97, guarantee=False, optimizer="sgd", method="non-private")]
    for optimizer, mean in zip(
        ("sgd", "accumulated-momentum", "running-momentum", "momentum"), (8, 85, 83, 9)
    ):
        for settings in ({}, {"compress": "topk"}):
            share = float(f"0.{mean}") - 0.2 * bool(settings)
            made.append(compressed(share, optimizer=optimizer, **settings))
    return made


def failures() -> list[Record]:
    """One of each kind."""
    return [
        record(None, "out-of-memory", "batch 4096 does not fit.", method="ghost", batch_size=4096),
        record(
            None,
            "unsupported",
            "fastdp is not installed; pip install it.",
            engine="fastdp",
            method="bk-ghost",
        ),
        record(
            None, "error", "ValueError: <script>alert(1)</script> & more", engine="opacus", method="ghost"
        ),
    ]


def engine_of(method: str) -> str:
    return LIBRARY.get(method, "torch")


def _both(make: Callable[..., Record], number: float, method: str, **case: Any) -> list[Record]:
    """Ours, and the library's that the paper has, with the same number."""
    engines = dict.fromkeys(("torch", engine_of(method)))
    return [make(number, method=method, engine=e, **case) for e in engines]


def _seed(*words: Any) -> int:
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:6], 16)


def _fig1() -> list[Record]:
    made = []
    for i, model in enumerate((*VITS, *BITS)):
        for method in ("per-example", "ghost", "bk-ghost", "auto"):
            speed = SPEED[method] * (1 - 0.06 * (i % 3))
            made += _both(race, speed, method, model=model, seed=i)
        made.append(race(0.9, engine="jax", method="per-example", model=model))
    return made


def _fig2() -> list[Record]:
    sizes = {
        "vit-tiny": 800,
        "vit-small": 400,
        "vit-base": 200,
        "bit-50x1": 180,
        "bit-101x1": 120,
        "bit-50x3": 50,
    }
    made = []
    for i, (model, size) in enumerate(sizes.items()):
        made.append(fits(size, method="non-private", model=model))
        made += _both(fits, round(size / (3 + 2 * i)), "per-example", model=model)
        made.append(fits(round(0.9 * size), method="auto", model=model))
    return made


def _fig3() -> list[Record]:
    costs = dict(zip((*VITS, *BITS), (1.6, 2.0, 2.6, 2.5, 2.7, 6.5)))
    return [r for m, c in costs.items() for r in _both(race, 1 / c, "per-example", model=m)]


def _over_batches(jax: bool) -> list[Record]:
    made = []
    for batch in (1, 2, 4, 8, 16, 32, 64):
        filled = 100 * batch / (batch + 3)
        ways = [("torch", m) for m in ("non-private", "per-example", "bk-ghost", "auto")]
        ways += [
            ("opacus", "per-example"),
            *((("jax", "per-example"), ("jax", "non-private")) if jax else ()),
        ]
        for engine, method in ways:
            speed = SPEED[method] * (1.6 if engine == "jax" and method != "non-private" else 1.0)
            speed *= 0.9 if engine == "opacus" else 1.0
            noise = 0.04 if engine == "jax" else 0.01
            made.append(
                race(
                    speed, filled, noise, _seed(batch, engine), batch_size=batch, engine=engine, method=method
                )
            )
    return made


def fig5(book_keeping: float = 0.8, ghost: float = 0.7) -> list[Record]:
    """Throughputs at the largest batch, with those of book-keeping and of ghost clipping as said."""
    speeds = SPEED | {"ghost": ghost, "mixed-ghost": ghost}
    speeds |= dict.fromkeys(("bk-ghost", "bk-mixed-ghost", "bk-mix-opt"), book_keeping)
    return [
        r
        for method, speed in speeds.items()
        if method != "per-example-vmap"
        for r in _both(fits, 50, method, rate=100 * speed)
    ]


def _fig7() -> list[Record]:
    return [
        race(
            speed * (1.8 if precision == "tf32" else 1),
            100 / (i + 1),
            model=model,
            method=method,
            precision=precision,
        )
        for i, model in enumerate(VITS)
        for method, speed in (("non-private", 1.0), ("per-example", 0.5))
        for precision in ("fp32", "tf32")
    ]


def scaled(private: float = 0.995, plain: float = 0.985, precision: str = "fp32") -> list[Record]:
    """Throughputs by Amdahl's law, with these parallel fractions."""
    made = []
    for n in (1, 2, 4, 8, 16):
        for method, fraction, rate in (("non-private", plain, 100), ("per-example", private, 40)):
            gain = 1.7 if precision == "tf32" else 1.0
            up = 1 / (1 - fraction + fraction / n)
            made.append(
                race(gain * rate * up / 100, measure="scaling", method=method, devices=n, precision=precision)
            )
    return made


def _table2() -> list[Record]:
    from dptrain.report.studies.paper import LARGEST_BATCH

    return [
        r
        for i, gib in enumerate((32.0, 40.0))
        for method, sizes in LARGEST_BATCH.items()
        for r in _both(fits, sizes[i], method, memory_gib=gib, model="vit-base")
    ]


def _loaders() -> list[Record]:
    return [
        race(1.0, rate * b / (b + 4), batch_size=b, settings=[["workers", w]], method="non-private")
        for w, rates in ((0, (40, 70, 90)), (2, (80, 90, 95)), (4, (95, 97, 98)))
        for b, rate in zip((4, 16, 64), rates)
    ]


def plausible() -> dict[str, list[Record]]:
    """Records for every study of the paper."""
    networks = ("simple-convnet", "large-convnet", "vgg11")
    return {
        "fig1": _fig1(),
        "fig2": _fig2(),
        "fig3": _fig3(),
        "fig4": _over_batches(jax=False),
        "fig5": fig5(),
        "fig6": _over_batches(jax=True),
        "fig7": _fig7(),
        "fig8": scaled(),
        "fig-a1": [
            compiled(s * b**0.3, batch_size=b, method=m)
            for b in (1, 4, 16, 64)
            for m, s in (("non-private", 3.0), ("per-example", 6.0))
        ],
        "fig-a2": scaled() + scaled(precision="tf32"),
        "fig-a3": scaled(),
        "fig-a4": scaled(),
        "table1": [
            record({"anatomy_bytes": {"parameters": int(m * 4e6)}}, measure="memory", model=name)
            for name, m in (("vit-tiny", 5.54), ("vit-small", 21.7), ("vit-base", 85.9), ("bit-50x1", 23.7))
        ],
        "table2": _table2(),
        "table-a1": [
            *(
                race(s, method=m, engine=e)
                for m, s in SPEED.items()
                for e in dict.fromkeys(("torch", engine_of(m)))
            ),
            race(0.9, engine="jax", method="per-example"),
            race(1.0, engine="jax", method="non-private"),
        ],
        "table-a2": [trained(0.7, model="vit-tiny")],
        "table-a3": [profile(0.68, engine="opacus", method="per-example"), profile(0.2, method="auto")],
        "table-a4": [
            trained(mean, engine=engine, method=method, precision=precision)
            for engine, method, precision, mean in (
                ("torch", "non-private", "fp32", 0.81),
                ("torch", "non-private", "tf32", 0.811),
                ("torch", "per-example", "fp32", 0.71),
                ("torch", "per-example", "tf32", 0.709),
                ("torch", "ghost", "fp32", 0.708),
                ("torch", "bk-ghost", "fp32", 0.712),
                ("jax", "per-example", "fp32", 0.711),
            )
        ],
        "batch-size-accuracy": [trained(0.7 + 0.001 * i, batch_size=b) for i, b in enumerate((8, 16, 32))],
        "tf32-steps": [trained(0.879, 230.0), trained(0.879, 100.0, precision="tf32")],
        "loader-workers": _loaders(),
        "dp-timing": [
            race(speed, 3000 / (i + 1), model=m, method=method, engine=e, noise=0.02)
            for i, m in enumerate(networks)
            for method, speed in (
                ("non-private", 1.0),
                ("per-example", 0.14),
                ("mixed-ghost", 0.4),
                ("auto", 0.8),
            )
            for e in dict.fromkeys(("torch", engine_of(method) if method == "per-example" else "torch"))
        ],
        "dp-runtime-profile": [
            profile(0.4, model="vgg11", method="per-example"),
            profile(0.2, model="vgg11"),
        ],
        "dp-memory": [
            memory(6.0, model="vgg11", method="per-example"),
            memory(2.0, model="vgg11", method="mixed-ghost"),
            memory(1.5, model="vgg11", method="auto"),
            fits(900, model="vgg11", method="non-private"),
            fits(60, model="vgg11", method="per-example"),
            fits(500, model="vgg11", method="mixed-ghost"),
        ],
        "naive-momentum": _momenta(),
        "public-compress": _compressions(),
        "simulation": [],
        "optimizers": compared(),
    }


def curves(private: float = 0.6920) -> dict[str, Any]:
    """What the simulation's file holds, with this share of ideal on 80 devices."""

    def curve(rate: float, share: float) -> list[list[float]]:
        lost = (1 / share - 1) / 79
        numbers = (1, 2, 4, 8, 16, 32, 64, 80, 100, 200, 400, 500, 800, 1000)
        return [[n, rate * n / (1 + lost * (n - 1))] for n in numbers]

    return {
        "curves": {"private": curve(40, private), "non-private": curve(100, 0.533)},
        "predicted": {"private share of ideal at 80": private},
    }


def study(name: str, records: Iterable[Record], scale: str = "small", **extra: Any) -> Study:
    """A study of these records."""
    title = name.replace("fig-a", "Figure A.").replace("fig", "Figure ").replace("table", "Table ")
    return Study(name, title, f"What {title} shows.", scale, tuple(records), (), extra)


def write(folder: Path, records: Iterable[Record]) -> None:
    """Files as `dptrain bench` writes them."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for one in records:
        fields = {name: getattr(one, name) for name in one.__dataclass_fields__}
        values = {"format": 1, **fields, "warnings": list(one.warnings)}
        (folder / "records" / f"{one.id}.json").write_text(json.dumps(values), encoding="utf-8")


def write_study(
    folder: Path, name: str, records: Iterable[Record], scale: str = "small", **extra: Any
) -> None:
    """As `dptrain reproduce` writes them, records and all."""
    chosen = list(records)
    write(folder, chosen)
    made = study(name, chosen, scale)
    values = {
        "name": name,
        "title": made.title,
        "shows": made.shows,
        "scale": scale,
        "cases": [r.id for r in chosen],
    }
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "studies" / f"{name}.json").write_text(json.dumps(values | extra), encoding="utf-8")
