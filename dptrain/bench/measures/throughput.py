"""Examples per second of logical steps, and the ratio to the best ordinary way, interleaved with it."""

from __future__ import annotations

from typing import Any

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant
from dptrain.bench.engines import enter
from dptrain.bench.outcome import failure
from dptrain.bench.recompilations import recompilations
from dptrain.core.allocation import keep_freed_memory
from dptrain.torch.ranks import all_ranks
from dptrain.training.device import matmul_precision


def throughput(case: Case) -> dict[str, Any]:
    """Check, warm up, race; see docs/records.md for the fields."""
    keep_freed_memory()  # as a training run does, for all alike
    with matmul_precision(case.precision):
        field = enter(case)
        own: Contestant | None = None
        verdict: dict[str, Any] = {"exactness": {"verdict": "non-private"}, "trains": None}
        if field.case is not None:
            own = field.case()
            exactness, trains = field.judge(own)
            verdict = {"exactness": exactness, "trains": trains}
            race.warm_up(own)
        results: dict[str, dict[str, Any]] = {}
        racing = [] if own is None else [own]
        for name, make in field.baselines.items():
            try:
                baseline = make()
                race.warm_up(baseline)
            except Exception as error:  # one way of many; what the case itself raises is the case's
                outcome = failure(error)
                results[name] = {"role": "baseline", "status": outcome.status, "sentence": outcome.sentence}
                continue
            racing.append(baseline)
        if len(racing) == (own is not None):
            raise RuntimeError(f"no baseline runs: {results}")
        race.race(racing, case.accumulate, case.seconds, all_ranks().tell)
        if own is not None and case.compile:
            verdict["recompilations"] = recompilations(own, case.batch_size)
        base = race.best(racing, case.accumulate)
        results |= {c.name: _figures(c, case) for c in racing}
        shown = own or base
        return verdict | {
            "contestants": results,
            "baseline": base.name,
            "examples_per_s": results[shown.name]["examples_per_s"],
            "ratio_to_non_private": results[shown.name]["examples_per_s"]
            / results[base.name]["examples_per_s"],
            "quartiles_of_paired_ratios": race.quartiles(race.paired_ratios(base, shown, case.accumulate)),
            "interval95_of_ratio": race.interval95(base, shown, case.accumulate),
        }


def _figures(contestant: Contestant, case: Case) -> dict[str, Any]:
    whole = race.logical_s(contestant, case.accumulate)
    return {
        "role": contestant.role,
        "status": "ok",
        "raw_first_physical_step_s": contestant.first_s,
        "raw_later_physical_step_s": contestant.later_s,
        "raw_end_of_logical_step_s": contestant.end_s,
        "logical_step_s": whole,
        "examples_per_s": case.devices * case.batch_size * case.accumulate / whole,
        "warm_up_s": contestant.warm_up_s,
    }
