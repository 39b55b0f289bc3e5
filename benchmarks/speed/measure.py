"""One case: check, time, and make a record of it."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dptrain.torch import Refused
from dptrain.torch.device_memory import ran_out_of_memory

from . import compilations, exactness, race
from . import contestants as ways
from .cases import Case, arithmetic, under_autocast
from .contestants import Contestant, Task, Unsupported
from .environment import Quiet, environment, without_places
from .peers import PEERS


@dataclass(frozen=True)
class Settings:
    """What to run of a case, and for how long.

    Attributes:
        methods: of dptrain, ``auto`` or ``auto+compiled+channels_last``.
        ordinary: non-private variants, ``kept`` or ``fresh`` with the same options.
        peers: other libraries.
        accumulate: physical batches in a logical one.
        limit_s: of the timed part.
        poisson_steps: with random masks, untimed, in which compilations are counted.
        precise: what the ratios are to be known to; see ``race.uncertainty``.
    """

    methods: Sequence[str] = ("auto",)
    ordinary: Sequence[str] = ("kept", "fresh")
    peers: Sequence[str] = ()
    batch_size: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    accumulate: int = 16
    limit_s: float = 90.0
    precise: float = 0.005
    poisson_steps: int = 0
    check: bool = True
    memory_budget: int | None = None


def measure(case: Case, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The record of a case; see ``Settings``."""
    with arithmetic(settings.precision) as dtype:
        size = settings.batch_size or case.batch_size
        loss_fn = under_autocast(case.loss_fn, dtype)
        torch.manual_seed(1)
        batch = tree_map(lambda t: t.to(settings.device), case.make_batch(size))
        reference = functools.cache(partial(exactness.Reference, case, loss_fn, batch, settings.device))
        clip_norm = reference(False).clip_norm if settings.check else 1.0
        task = Task(case, loss_fn, batch, size, settings.device, clip_norm)
        with Quiet() as quiet:
            racing, results = assemble(task, settings, reference if settings.check else None, say)
            reference.cache_clear()
            race.race(racing, settings.accumulate, settings.limit_s, settings.precise, settings.device)
        for contestant in racing:
            count = compilations.during_poisson_steps(
                contestant, size, settings.poisson_steps, settings.device
            )
            if count is not None:
                results[contestant.name]["recompilations"] = count
    base = race.best(racing, settings.accumulate)
    for contestant in racing:
        results[contestant.name] |= figures(contestant, base, settings.accumulate)
    if settings.check:
        for contestant in racing:
            if contestant.kind != "non-private":
                method = ways.split(contestant.name)[0]
                verdict = exactness.in_float64(case, contestant.name, method, settings.device)
                results[contestant.name]["float64"] = verdict
    return {
        "kind": "speed",
        "case": {
            "name": case.name,
            "batch_size": size,
            "device": settings.device,
            "precision": settings.precision,
            "accumulate": settings.accumulate,
            "memory_budget": settings.memory_budget,
            "poisson_steps": settings.poisson_steps,
        },
        "environment": environment(settings.device),
        "quiet": quiet.record(),
        "baseline": base.name,
        "contestants": results,
    }


def enter(task: Task, name: str, memory_budget: int | None = None) -> Contestant:
    """A contestant by name: ``non-private kept``, ``opacus``, or a method of dptrain's table.

    Raises:
        Unsupported: it does not exist here.
    """
    if name.startswith("non-private "):
        return ways.non_private(task, name.removeprefix("non-private "))
    return PEERS[name](task) if name in PEERS else ways.private(task, name, memory_budget)


def assemble(
    task: Task,
    settings: Settings,
    reference: Callable[[bool], exactness.Reference] | None,
    say: Callable[[str], None],
) -> tuple[list[Contestant], dict[str, dict[str, Any]]]:
    """Those that can take part, checked and warm, and what is known of all so far."""
    wanted = [f"non-private {spec}" for spec in settings.ordinary]
    wanted += [*settings.methods, *settings.peers]
    racing, results = [], {}
    for name in wanted:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                contestant = enter(task, name, settings.memory_budget)
                as_timed = None
                if reference and contestant.kind != "non-private":
                    channels_last = "channels_last" in name
                    as_timed = reference(channels_last).judge(contestant, task.clip_norm)
                race.warm_up(contestant, settings.device)
        except Exception as error:
            results[name] = failure(error)
            say(f"  {name:<32} {results[name]['status']}: {results[name]['sentence']}")
            continue
        racing.append(contestant)
        results[name] = {
            "status": "ok",
            "kind": contestant.kind,
            "warm_up_s": contestant.warm_up_s,
            "plan": contestant.plan(),
            "as_timed": as_timed,
            "warnings": sorted({str(w.message).split("\n")[0][:300] for w in warned}),
        }
        if contestant.kind == "dptrain":  # that it runs uncompiled, say
            for sentence in results[name]["warnings"]:
                say(f"  {name:<32} warns: {sentence}")
    return racing, results


def failure(error: Exception) -> dict[str, Any]:
    """``unsupported`` says why; an error keeps its traceback and is never filed as lack of memory."""
    sentence = str(error).strip().split("\n")[0][:300] or type(error).__name__
    if isinstance(error, (Unsupported, Refused)):
        return {"status": "unsupported", "sentence": sentence}
    if ran_out_of_memory(error):
        return {"status": "out-of-memory", "sentence": sentence}
    return {"status": "error", "sentence": sentence, "traceback": without_places(traceback.format_exc())}


def figures(contestant: Contestant, base: Contestant, accumulate: int) -> dict[str, Any]:
    whole = race.logical_s(contestant, accumulate)
    paired = race.paired_ratios(base, contestant, accumulate)
    return {
        "logical_step_s": whole,
        "ratio_to_non_private": race.logical_s(base, accumulate) / whole,
        "quartiles_of_paired_ratios": race.quartiles(paired),
        "raw_first_physical_step_s": contestant.first_s,
        "raw_later_physical_step_s": contestant.later_s,
        "raw_end_of_logical_step_s": contestant.end_s,
    }


def is_exact(record: dict[str, Any]) -> bool:
    """Whether every result of dptrain's is what single examples give."""
    for result in record["contestants"].values():
        if result.get("kind") != "dptrain" or "float64" not in result:
            continue
        as_timed, lowered = result["as_timed"], record["case"]["precision"] != "fp32"
        if result["float64"]["verdict"] != "exact" or not (lowered or exactness.is_close(as_timed)):
            return False
    return True
