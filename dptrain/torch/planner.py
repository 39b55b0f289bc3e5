"""The plan: for each use, how its norm is formed and how the clipped sum is.

A method fixes both choices; ``auto`` takes what is fastest on this device within a memory budget
(``fastest.py``). A plan is deterministic once made, and printable.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from dptrain.core import cost, methods
from dptrain.core.methods import Capture, Method, Norm, Sum

from . import fastest, plan_table, route_cost
from .errors import Refused
from .pullback import Group, Kind
from .routes import CPU, DIRECT, GPU, Machine, Route, has_gram, is_direct
from .stopwatch import Stopwatch
from .trace import Findings, UseFacts

#: what a step spends on a use whatever the number of examples
PART_S_PER_USE = 3e-4


@dataclass(frozen=True)
class Options:
    """What ``auto`` may do.

    Attributes:
        memory_budget: bytes that gradients and operands may hold until the clip factors are known; None
            for no limit.
        routes: (pattern of parameter names, route) in the order of precedence.
    """

    memory_budget: int | None = None
    routes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Findings of the probe and a route for each group of uses."""

    method: Method
    findings: Findings
    routes: tuple[Route, ...]
    batch_size: int
    machine: Machine = CPU
    options: Options = Options()
    #: in how many parts a batch is taken, one after the other, to stay within the memory budget
    parts: int = 1
    #: the spacing of the integer grid that examples are summed on; all groups are then pulled back one by one
    grid: float | None = None

    @functools.cached_property
    def group_of(self) -> dict[int, tuple[int, Group, Route]]:
        """By use: the number of its group, the group and its route."""
        return {
            index: (number, group, route)
            for number, (group, route) in enumerate(zip(self.findings.groups, self.routes))
            for index in group.uses
        }

    @functools.cached_property
    def results(self) -> frozenset[int]:
        """Uses, by index, whose norm needs what their operation yielded."""
        return frozenset(
            index
            for group, route in zip(self.findings.groups, self.routes)
            if group.kind is Kind.STANDARDISED and route.norm == "gram"
            for index in group.uses
        )

    @functools.cached_property
    def second_backward(self) -> bool:
        return any(route.sum == "second-backward" for route in self.routes)

    def rerouted(self, pattern: tuple) -> Plan:
        """With uses of this pattern routed; routes of routed uses are chosen anew for each batch."""
        return dataclasses.replace(self, findings=self.findings.rerouted(pattern))

    def with_patterns(self, patterns: frozenset) -> Plan:
        """With further patterns of routed uses, seen before."""
        findings = dataclasses.replace(self.findings, patterns=self.findings.patterns | patterns)
        return dataclasses.replace(self, findings=findings)

    def rows(self) -> list[dict[str, Any]]:
        """One row per use: what ``dptrain check --all`` shows."""
        return plan_table.rows(self, self.machine)

    def describe(self) -> str:
        """The plan as a table of text, repeated layers folded."""
        table = plan_table.describe(self.rows())
        if self.parts == 1:
            return table
        return f"in {self.parts} parts of {self.part_size} examples, which are planned anew\n{table}"

    @property
    def part_size(self) -> int:
        """Examples of a part."""
        return -(-self.batch_size // self.parts)


def make_plan(
    method: Method,
    findings: Findings,
    batch_size: int,
    device: torch.device,
    options: Options | None = None,
    stopwatch: Stopwatch | None = None,
) -> Plan:
    """Choose a route for each group.

    Args:
        options: of ``auto``.
        stopwatch: to measure what is large enough; without one the cost model decides everything.

    Raises:
        Refused: a route that was asked for is not one of a parameter's.
    """
    machine, options = GPU if device.type == "cuda" else CPU, options or Options()
    seen = [_reached(group, findings) for group in findings.groups]
    if method.capture is Capture.PLANNED:
        choice = _planned(findings, seen, batch_size, machine, options, stopwatch)
    else:
        choice = fastest.Choice([_prescribed(g, facts, method) for g, facts in zip(findings.groups, seen)])
    return Plan(method, findings, tuple(choice.routes), batch_size, machine, options, choice.parts)


def _reached(group: Group, findings: Findings) -> list[UseFacts]:
    facts = [findings.uses[i] for i in group.uses]
    return [fact for fact in facts if fact.reached] or facts[:1]


def _planned(
    findings: Findings,
    seen: list[list[UseFacts]],
    batch_size: int,
    machine: Machine,
    options: Options,
    stopwatch: Stopwatch | None,
) -> fastest.Choice:
    menu = [
        _wanted(group, fastest.offers(group, facts, batch_size, machine, stopwatch), options)
        for group, facts in zip(findings.groups, seen)
    ]
    if stopwatch is not None:
        stopwatch.remember()
    values = {(fact.leaves, fact.value): math.prod(fact.value) for fact in findings.uses}
    part_s = PART_S_PER_USE * len(findings.uses) + (
        route_cost.PASSES_OVER_SUMS * route_cost.ITEMSIZE * sum(values.values()) / machine.bytes_per_s
    )
    choice = fastest.choose(menu, options.memory_budget, batch_size, part_s)
    if choice is not None:
        return choice
    # Nothing fits: hold no operands and keep no gradients, for the price of another backward pass.
    ghost = methods.resolve("mixed-ghost")
    return fastest.Choice([_prescribed(g, facts, ghost) for g, facts in zip(findings.groups, seen)])


def _wanted(group: Group, offers: list[fastest.Offer], options: Options) -> list[fastest.Offer]:
    """Only the route that was asked for, if one was and there is a choice."""
    if len(offers) == 1:
        return offers
    for pattern, name in options.routes:
        if any(fnmatch.fnmatchcase(leaf, pattern) for leaf in group.leaves):
            found = [offer for offer in offers if str(offer.route) == name]
            if not found:
                raise Refused(
                    f"{group.leaves[0]} has no route {name!r}: choose one of "
                    f"{', '.join(str(offer.route) for offer in offers)}."
                )
            return found
    return offers


def _prescribed(group: Group, facts: list[UseFacts], method: Method) -> Route:
    if group.one_by_one:  # sum what was normed, after it was pulled back
        return Route("materialise", "reuse")
    gram = has_gram(group, facts)
    if gram and method.norm is Norm.CHEAPER:
        positions = sum(fact.size.positions for fact in facts)
        whole = route_cost.shape_of(facts[0])
        gram = cost.gram_saves_memory(cost.UseShape(positions, whole.d_in, whole.d_out))
    elif method.norm is Norm.MATERIALISE:
        gram = False
    norm = "direct" if is_direct(group, facts) else ("gram" if gram else "materialise")
    if method.sum is Sum.SECOND_BACKWARD:
        return Route(norm, "second-backward")
    if norm == "direct":  # as small as the parameter's own gradient is for most
        return DIRECT
    reuse = method.sum is Sum.REUSE or (method.sum is Sum.REUSE_OR_CONTRACT and not gram)
    return Route(norm, "reuse" if reuse else "contract")
