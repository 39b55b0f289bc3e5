"""Time by section of a step, beside that of ordinary training, and traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant, Unsupported
from dptrain.bench.engines import framework
from dptrain.bench.measures.one_way import alone
from dptrain.bench.timeline import medians, profiled, seconds_by_section
from dptrain.bench.torch_task import arithmetic

#: as many steps are profiled
STEPS = 5


def profile(case: Case, folder: Path | None = None) -> dict[str, Any]:
    """Medians over steps of one physical batch and an end.

    folder: where the traces of the last step go.

    Raises:
        Unsupported: the engine is JAX, which XLA compiles to one piece.
    """
    if framework(case) == "jax":
        raise Unsupported("a step in JAX is one compiled piece: its sections cannot be told apart.")
    ordinary = replace(case, engine="torch", method="non-private", budget_mib=None)
    with arithmetic(case.precision):
        samples = {}
        for name, one in (("", case), ("baseline_", ordinary)):
            contestant = alone(one)
            race.warm_up(contestant)
            trace = None if folder is None else folder / f"{name}{case.id}.json"
            samples[name] = _sections(contestant, case.device, trace)
    return {
        "sections_s": medians(samples[""]),
        "baseline_sections_s": medians(samples["baseline_"]),
        "raw_sections_s": samples[""],
        "traces": [] if folder is None else [f"{name}{case.id}.json" for name in samples],
    }


def _sections(contestant: Contestant, device: str, trace: Path | None) -> dict[str, list[float]]:
    steps = [profiled(contestant, device) for _ in range(STEPS - 1)]
    return seconds_by_section([*steps, profiled(contestant, device, trace)])
