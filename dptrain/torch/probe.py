"""The probe: once per input signature, learn where the examples lie and that they do not mix.

It runs on stand-in rows and on a copy of the model with randomised parameters (a zero-initialised
head would hide mixing), and leaves the random state as it found it. At a batch of 16 it
costs less than five ordinary steps (``benchmarks/probe_cost.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import separation
from .errors import Misfit, Refused
from .guards import listed
from .provocations import provoke
from .stand_ins import isolated_randomness
from .structure import ATTEMPTS, Structure, find_structure, resolve
from .trace import Findings, names
from .understudy import Understudy


@dataclass(frozen=True)
class Stage:
    """An understudy on a few stand-in rows, for a rehearsal of the method that was chosen."""

    understudy: Understudy
    size: int
    rows: Any
    findings: Findings


def probe(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
) -> tuple[Findings, Stage]:
    """Learn the structure of ``loss_fn(model, batch)`` and check that examples do not mix.

    Raises:
        Refused: examples mix, or it could not be shown that they do not.
    """
    with isolated_randomness(batch):
        understudy = Understudy(model, loss_fn, batch, mask, batch_size)
        try:
            return learn(understudy, batch_size)
        except Refused as refusal:
            # rounding can send a token elsewhere, and so look like mixing: in float64 it hardly does
            second = Understudy(model, loss_fn, batch, mask, batch_size)
            if not second.widen():
                raise
            with contextlib.suppress(Exception):
                return learn(second, batch_size)
            raise refusal


def learn(understudy: Understudy, batch_size: int) -> tuple[Findings, Stage]:
    """The same with an understudy that has been made, and without a second opinion."""
    structure = find_structure(understudy, batch_size)
    small = structure.sizes[0]
    if small > 1:
        provoke(understudy, structure.layouts, small)
    size = batch_size if batch_size > 1 else small  # one example has none to mix with
    structure = resolve(understudy, structure, size)
    structure, findings, still = _examples_apart(understudy, structure, size)
    if size != batch_size:
        findings = _findings(understudy, structure, batch_size)
    rows = understudy.stand_ins(small, 0)
    stage = Stage(understudy, small, rows, _without(_findings(understudy, structure, small), still))
    return _without(findings, still), stage


def _examples_apart(
    understudy: Understudy, structure: Structure, size: int
) -> tuple[Structure, Findings, set[tuple]]:
    """Attempt after attempt until every use has been moved by an example; the names of those that never are.

    A gradient that is always zero mixes nothing. Should one come all the same, the step notices.
    """
    moved: set[tuple] = set()
    waiting: set[tuple] = set()
    findings = None
    attempt = 0
    while attempt < ATTEMPTS:
        try:
            record = separation.check(understudy, structure, size, attempt)
        except Misfit as misfit:
            structure = structure.rerouted(misfit.pattern)
            continue
        attempt += 1
        if record is None:
            continue
        unclear = [
            fact
            for name, fact in zip(names(record.findings.uses), record.findings.uses)
            if fact.options and name in record.moved
        ]
        if unclear:  # moved only now, where several layouts would do: let each step find the owners
            structure = structure.rerouted(unclear[0].pattern)
            attempt -= 1
            continue
        findings = record.findings
        moved |= record.moved
        named = zip(names(findings.uses), findings.uses)
        waiting = {name for name, fact in named if fact.layout is not None and name not in moved}
        if not waiting:
            break
    if findings is None or not moved:
        leaves = sorted({leaf for fact in structure.facts if fact.reached for leaf in fact.leaves})
        raise Refused(
            f"could not show that examples do not mix: no stand-in example moved {listed(leaves)}. "
            "See that the losses are finite and depend on the examples."
            + (f" The model's own error was: {understudy.failure}" if understudy.failure else "")
        )
    return structure, findings, waiting


def _findings(understudy: Understudy, structure: Structure, size: int) -> Findings:
    understudy.randomise(0)
    capture, _ = understudy.forward(understudy.stand_ins(size, 0), size, structure.layouts)
    return structure.at_size(capture, understudy.parameters)


def _without(findings: Findings, still: set[tuple]) -> Findings:
    """With uses that nothing moves marked as such."""
    facts = tuple(
        dataclasses.replace(fact, layout=None) if name in still else fact
        for name, fact in zip(names(findings.uses), findings.uses)
    )
    return dataclasses.replace(findings, uses=facts)
