"""Who can take part in a case: our two engines, and the peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dptrain.bench import exactness, jax_engine, torch_engine
from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant, Unsupported
from dptrain.bench.jax_task import JaxTask
from dptrain.bench.peers import PEERS
from dptrain.bench.torch_task import Task
from dptrain.core import methods
from dptrain.torch.ranks import all_ranks

OURS = ("torch", "jax")
#: examples on which exactness is judged, of the contestant that is timed and in float64
TIMED_EXAMPLES, FLOAT64_EXAMPLES = 16, 3
NAMES = (*OURS, *PEERS)

Maker = Callable[[], Contestant]


@dataclass(frozen=True)
class Field:
    """Those that take part in a case; each is set up when it is called.

    Attributes:
        case: the private way; None where the case itself is not private.
        plain: the usual way of ordinary training, with the case's options.
        baselines: all ways of ordinary training, by name.
        judge: whether the case's contestant is exact, and which parameters it trains.
    """

    case: Maker | None
    plain: Maker
    baselines: dict[str, Maker]
    judge: Callable[[Contestant], tuple[dict[str, Any], dict[str, Any]]]


def is_ordinary(case: Case) -> bool:
    """Whether the case is not private."""
    try:
        return not methods.resolve(case.method).is_private
    except ValueError:  # a peer's own name
        return False


def framework(case: Case) -> str:
    """``torch`` or ``jax``."""
    return case.engine if case.engine in OURS else PEERS[case.engine].framework


def enter(case: Case, clip_norm: float | None = None) -> Field:
    """Those that take part.

    clip_norm: by default the median norm of the batch's examples, so that half of them are clipped.

    Raises:
        Unsupported: the engine, the device or the precision is not there.
    """
    check_device(case)
    if case.devices != all_ranks().size:
        raise Unsupported("several devices are for the measure scaling, and for the PyTorch engine.")
    if is_ordinary(case):
        clip_norm = 1.0
    return _in_jax(case, clip_norm) if framework(case) == "jax" else _in_torch(case, clip_norm)


def _in_torch(case: Case, clip_norm: float | None) -> Field:
    n = min(case.batch_size, TIMED_EXAMPLES)
    task = Task(case, clip_norm or exactness.median_norm(Task(case), n))

    def judge(contestant: Contestant) -> tuple[dict[str, Any], dict[str, Any]]:
        timed = exactness.judge(contestant, task, n)
        return _verdict(timed, _in_float64(task), case.precision), exactness.trains(contestant, task)

    own, plain = _own(case, task, torch_engine.private), lambda: torch_engine.plain(task)
    return Field(own, plain, torch_engine.baselines(task), judge)


def _in_float64(task: Task) -> dict[str, Any]:
    """The verdict where nothing but a wrong formula makes a difference, on a few examples."""
    case = dataclasses.replace(task.case, batch_size=FLOAT64_EXAMPLES, compile=False)
    wide = exactness.in_float64(Task(case))
    wide = exactness.in_float64(Task(case, exactness.median_norm(wide, FLOAT64_EXAMPLES)))
    own = _own(case, wide, torch_engine.private)
    assert own is not None
    return exactness.judge(own(), wide, FLOAT64_EXAMPLES)


def _verdict(timed: dict[str, Any], wide: dict[str, Any], precision: str) -> dict[str, Any]:
    """One of two: in float32 what is timed must be exact too, up to rounding. In narrower types rounding can
    be anything; the record has its error."""
    told = timed if timed["verdict"] != "exact" and precision == "fp32" else wide
    return {
        "verdict": told["verdict"],
        "error_of_sum": wide["error_of_sum"],
        "error_as_timed": timed["error_of_sum"],
        "sentence": told["sentence"],
    }


def _in_jax(case: Case, clip_norm: float | None) -> Field:
    if case.compile:
        raise Unsupported("every step in JAX is compiled: leave compile out.")
    task = JaxTask(case)
    task = task.clipped_at(clip_norm or jax_engine.median_norm(task))

    def judge(contestant: Contestant) -> tuple[dict[str, Any], dict[str, Any]]:
        verdict = timed = jax_engine.judge(contestant, task)
        if case.precision != "fp32":  # in narrower types rounding can be anything
            wide = JaxTask(dataclasses.replace(case, precision="fp32"), task.clip_norm)
            own = _own(case, wide, jax_engine.private)
            assert own is not None
            verdict = jax_engine.judge(own(), wide)
        return verdict | {"error_as_timed": timed["error_of_sum"]}, jax_engine.trains(task)

    baselines = jax_engine.baselines(task)
    return Field(_own(case, task, jax_engine.private), next(iter(baselines.values())), baselines, judge)


def _own(case: Case, task: Any, ours: Callable[[Any], Contestant]) -> Maker | None:
    if is_ordinary(case):
        return None
    if case.engine in OURS:
        return lambda: ours(task)
    return lambda: PEERS[case.engine].contestant(task, case.method)


def check_device(case: Case) -> None:
    """Raises Unsupported where the device is not there, or does not compute in the case's precision."""
    on_gpu = case.device.startswith("cuda")
    if framework(case) == "torch" and on_gpu:
        number = int(case.device.partition(":")[2] or 0)
        if not torch.cuda.is_available() or number >= torch.cuda.device_count():
            raise Unsupported(f"there is no device {case.device} here.")
    if case.precision in ("tf32", "fp16") and not on_gpu:
        raise Unsupported(f"{case.precision} is for a GPU.")
    if (
        case.precision == "tf32"
        and framework(case) == "torch"
        and torch.cuda.get_device_capability(case.device)[0] < 8
    ):
        raise Unsupported("this GPU has no TF32.")
    if case.precision == "fp16":
        raise Unsupported("fp16 is not supported: bf16 needs no scaling of losses.")
