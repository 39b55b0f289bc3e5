"""``check``: what dptrain would do with a model, and whether it is exact."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten_with_path

from dptrain.core import methods
from dptrain.core.methods import Capture

from . import exactness, memory, plan_table
from .clipping import LossFn, clipped_grad
from .errors import Refused
from .exactness import TOLERANCE, Exactness
from .guards import trainable
from .memory import Forecast
from .planner import Plan

CONVERT = (
    "`dptrain check --convert`, or dptrain.torch.convert(model), puts GroupNorm in the place of BatchNorm."
)


class Verdict(enum.StrEnum):
    EXACT = "EXACT"
    REFUSED = "REFUSED"
    WRONG = "WRONG"


@dataclass
class CheckReport:
    """What ``check`` found. Parts that a refusal kept from being made are empty or None.

    Attributes:
        parameters: how many numbers the model holds; ``trainable``: of those that are trained.
        batch: name, shape and type of each tensor.
        plan: one row per use, see ``Plan.rows``.
        uses: for each trainable parameter, how many uses receive its gradient.
        unused: trainable parameters without any (or experts to which no example was routed).
        frozen: how many parameters are not trained.
        probed_size: the batch size at which examples were shown not to mix; None if it was not shown.
        verdict: EXACT, REFUSED (see ``reason``) or WRONG.
        reason: the sentence of a refusal, or what is wrong.
        advice: what to do, where there is more to say than the reason does.
        seconds: time by part.
    """

    model: str
    method: str
    parameters: int
    trainable: int
    frozen: int
    batch: tuple[tuple[str, tuple[int, ...], str], ...]
    plan: list[dict[str, Any]] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    probed_size: int | None = None
    exactness: Exactness | None = None
    memory: Forecast | None = None
    verdict: Verdict = Verdict.REFUSED
    reason: str | None = None
    advice: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.verdict is Verdict.EXACT

    @property
    def folded_plan(self) -> list[dict[str, Any]]:
        """The plan with repeated layers folded into one row."""
        return plan_table.fold(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["verdict"] = self.verdict.value
        out["batch"] = [{"name": n, "shape": list(s), "dtype": d} for n, s, d in self.batch]
        out["plan"] = [{**row, "value": list(row["value"])} for row in self.plan]
        if self.exactness is not None:
            out["exactness"] = dataclasses.asdict(self.exactness) | {
                "exact": self.exactness.exact,
                "gradient_errors": dict(self.exactness.gradient_errors),
            }
        if self.memory is not None:
            out["memory"] = dataclasses.asdict(self.memory) | {"largest": self.memory.largest}
        return out


def check(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    method: str = "auto",
    clip_norm: float | None = None,
    tolerance: float = TOLERANCE,
    allow_unused: bool = False,
    memory_bytes: int | None = None,
    progress: Callable[[str], None] = lambda part: None,
) -> CheckReport:
    """Plan a model, compare the plan with single examples in float64, and predict its memory.

    The model is left as it is. Time and memory grow with the batch: two or three examples suffice.

    Args:
        loss_fn: ``loss_fn(model, batch) -> [B]``, as for ``clipped_grad``.
        clip_norm: C of the comparison; by default the norm of the first example.
        tolerance: the largest relative error that counts as exact.
        allow_unused: accept trainable parameters without a gradient.
        memory_bytes: what the largest physical batch is predicted for; by default the device's.
        progress: called with the name of each part before it begins.

    Raises:
        ValueError: a method that plans nothing, or a batch that is none.
    """
    row = methods.resolve(method)
    if row.capture not in (Capture.USES, Capture.PLANNED):
        raise ValueError(
            f"{row.name} makes no plan that could be checked; choose --method auto, for example."
        )
    task = clipped_grad(model, loss_fn, clip_norm=clip_norm or 1.0, method=method, allow_unused=True)
    report = _header(model, row.name, batch)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            report.seconds[name] = round(time.perf_counter() - started, 3)

    try:
        with part("plan"):
            plan = task.plan(batch)
        _cover(report, plan, model)
        task.allow_unused = allow_unused
        task._check_coverage(plan.findings, trainable(model))
        with part("exactness"):
            report.exactness = exactness.measure(task, plan, batch, clip_norm, tolerance)
        with part("memory"):
            report.memory = memory.forecast(task, plan, batch, memory_bytes)
    except Refused as refusal:
        report.reason = str(refusal)
        if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
            report.advice = CONVERT
        return report
    report.verdict = Verdict.EXACT if report.exactness.exact else Verdict.WRONG
    if report.verdict is Verdict.WRONG:
        report.reason = (
            f"the plan differs from single examples by {report.exactness.worst:.1e}, where {tolerance:.0e} "
            "is allowed: please report this model; method='per-example-loop' works for it."
        )
    return report


def _header(model: nn.Module, method: str, batch: Any) -> CheckReport:
    everything = list(model.parameters())
    trained = trainable(model).values()
    tensors = [(_name(path), t) for path, t in tree_flatten_with_path(batch)[0] if isinstance(t, Tensor)]
    return CheckReport(
        model=type(model).__name__,
        method=method,
        parameters=sum(p.numel() for p in everything),
        trainable=sum(p.numel() for p in trained),
        frozen=len(everything) - len(trained),
        batch=tuple((name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors),
    )


def _name(path: tuple[Any, ...]) -> str:
    """``inputs.ids`` or ``0`` for the place of a tensor in a batch; "batch" if it is one tensor."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "batch"


def _cover(report: CheckReport, plan: Plan, model: nn.Module) -> None:
    report.plan = plan.rows()
    report.uses = dict.fromkeys(trainable(model), 0)
    for fact in plan.findings.uses:
        if fact.reached:
            for leaf in fact.leaves:
                report.uses[leaf] += 1
    report.unused = tuple(name for name, count in report.uses.items() if not count)
    report.probed_size = max(2, plan.batch_size)
