"""The probe: once per input signature, learn where the examples lie and that they do not mix.

It runs on stand-in rows and on a copy of the model with randomised parameters (a zero-initialised
head would hide mixing), and leaves the random state as it found it. What it costs is about that of
four ordinary steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import separation
from .errors import Refused
from .guards import listed
from .stand_ins import isolated_randomness
from .structure import ATTEMPTS, Structure, find_structure
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
    allow_unused: bool = False,
) -> tuple[Findings, Stage]:
    """Learn the structure of ``loss_fn(model, batch)`` and check that examples do not mix.

    Raises:
        Refused: examples mix, or it could not be shown that they do not.
    """
    with isolated_randomness(batch):
        understudy = Understudy(model, loss_fn, batch, mask, batch_size)
        structure = find_structure(understudy, batch_size)
        small = structure.sizes[0]
        size = batch_size if batch_size > 1 else small  # one example has none to mix with
        structure, findings, still = _examples_apart(understudy, structure, size)
        if still and not allow_unused:
            raise Refused(
                "could not show that examples do not mix: no stand-in example moved "
                f"{listed(still)}. Freeze the parameters with requires_grad_(False), or pass "
                "allow_unused=True if their gradient is meant to be zero."
            )
        if findings is None or size != batch_size:
            findings = _findings(understudy, structure, batch_size)
        stage = Stage(
            understudy,
            small,
            understudy.stand_ins(small, 0),
            _without(_findings(understudy, structure, small), still),
        )
        return _without(findings, still), stage


def _examples_apart(
    understudy: Understudy, structure: Structure, size: int
) -> tuple[Structure, Findings | None, list[str]]:
    """Attempt after attempt until every use has been moved by an example; the leaves of the others."""
    moved: set[tuple] = set()
    waiting: dict[tuple, tuple[str, ...]] = {}
    findings = None
    attempt = 0
    while attempt < ATTEMPTS:
        try:
            record = separation.check(understudy, structure, size, attempt)
        except separation.Misfit as misfit:
            structure = structure.reroute(misfit.fact.pattern)
            continue
        attempt += 1
        if record is None:
            continue
        findings = record.findings
        moved |= record.moved
        waiting = {
            name: fact.leaves
            for name, fact in zip(names(findings.uses), findings.uses)
            if fact.layout is not None and name not in moved
        }
        if not waiting:
            return structure, findings, []
    leaves = waiting.values() if findings else [f.leaves for f in structure.facts if f.reached]
    return structure, findings, sorted({leaf for each in leaves for leaf in each})


def _findings(understudy: Understudy, structure: Structure, size: int) -> Findings:
    understudy.randomise(0)
    capture, _ = understudy.forward(understudy.stand_ins(size, 0), size, structure.layouts)
    return structure.at_size(capture, understudy.parameters)


def _without(findings: Findings, still: list[str]) -> Findings:
    """With the uses of leaves that nothing moves left out; a gradient that comes all the same is refused."""
    if not still:
        return findings
    facts = tuple(
        dataclasses.replace(f, layout=None) if set(f.leaves) <= set(still) and not f.routed else f
        for f in findings.uses
    )
    covered = frozenset(leaf for f in facts if f.reached for leaf in f.leaves)
    return dataclasses.replace(findings, uses=facts, covered=covered)
