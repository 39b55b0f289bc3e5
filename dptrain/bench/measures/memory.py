"""Peak memory of a step, and what it is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.bench.engines import framework
from dptrain.bench.measures.one_way import alone
from dptrain.bench.meters import meter
from dptrain.bench.processes import Ended, run
from dptrain.bench.timeline import Section, profiled
from dptrain.bench.torch_task import Task
from dptrain.training.device import matmul_precision

#: logical steps that are taken before the one whose peak counts
WARM_UP = 2


def memory(case: Case) -> dict[str, Any]:
    """Peak and anatomy, each of the case and of ordinary training in a process of its own."""
    ordinary = replace(case, engine=framework(case), method="non-private", budget_mib=None)
    if framework(case) == "jax" and case.device.startswith("cuda"):
        raise Unsupported("memory of JAX is measured on a CPU.")
    peaks = {}
    for name, one in (("", case), ("baseline_", ordinary)):
        outcome = run(peak_of, one)
        if outcome.status != "ok":
            raise Ended(outcome)
        peaks |= {f"{name}peak_bytes": outcome.value}
    found = peaks | {"ratio_to_non_private": peaks["peak_bytes"] / peaks["baseline_peak_bytes"]}
    return found if framework(case) == "jax" else found | anatomy(case)


def peak_of(case: Case) -> int:
    """Peak bytes of a logical step of two physical ones, the model included, after the first ones."""
    gauge = meter(case.device)
    with matmul_precision(case.precision):
        contestant = alone(case)
        for steps in range(WARM_UP + 1):
            if steps == WARM_UP:
                gauge.reset()
            contestant.step()
            contestant.step()
            contestant.end()
    return gauge.peak()


def anatomy(case: Case) -> dict[str, Any]:
    """Bytes of tensors by what they are for, and how many are alive after each part of a step."""
    with matmul_precision(case.precision):
        contestant = alone(case)
        race.warm_up(contestant)
        line = profiled(contestant, case.device, memory=True)
    parameters, trained = _sizes(case)
    of = {name: [s for s in line if s.name == name] for name in {s.name for s in line}}

    def grown(name: str, until: str = "after") -> int:
        return max((getattr(s, until) - s.before for s in of.get(name, ())), default=0)

    if "forward" not in of:  # a method that goes through the model in one piece
        return {}
    before_noise = [s for s in line if s.name in ("backward", "norms", "clip and accumulate")]
    beyond = max(s.peak for s in before_noise) - of["forward"][0].after
    after = {
        "after gradient": _last(of, "backward"),
        "after clip": _last(of, "clip and accumulate"),
        "after noise": _last(of, "noise"),
        "after step": _last(of, "optimizer step"),
    }
    return {
        "anatomy_bytes": {
            "parameters": parameters,
            "gradients": trained,
            "activations": grown("forward"),
            "per-example gradients": contestant.held_bytes() + max(0, beyond - trained),
            "noise": grown("noise", "peak"),
            "optimizer": 2 * trained,  # Adam's two moments
        },
        "snapshots_bytes": {name: parameters + alive for name, alive in after.items() if alive is not None},
    }


def _last(of: dict[str, list[Section]], name: str) -> int | None:
    return of[name][-1].after if name in of else None


def _sizes(case: Case) -> tuple[int, int]:
    """Bytes of all parameters and buffers, and of the trained ones."""
    model = Task(case).model()
    whole = [*model.parameters(), *model.buffers()]

    def total(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    return total(whole), total([p for p in model.parameters() if p.requires_grad])
