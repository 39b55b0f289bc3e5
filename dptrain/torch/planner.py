"""The plan: for each use, how its norm is formed and how the clipped sum is.

A method fixes both choices; ``auto`` takes what a cost model finds fastest. A plan is
deterministic and printable.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dptrain.core import cost
from dptrain.core.methods import Capture, Method, Norm, Sum

from . import plan_table
from .pullback import Group, Kind
from .trace import Findings, UseFacts
from .uses.lookup import Lookup


@dataclass(frozen=True)
class Machine:
    """What a device can do: operations and bytes a second. Only their ratio matters here."""

    flops_per_s: float
    bytes_per_s: float


#: two AVX-512 cores, and a data-centre GPU; a measurement on the device will replace them
CPU = Machine(flops_per_s=1.5e11, bytes_per_s=2.5e10)
GPU = Machine(flops_per_s=5e13, bytes_per_s=2e12)


@dataclass(frozen=True)
class Route:
    """How one use (or one group of tied or transformed values) is normed and summed.

    Attributes:
        norm: "direct", "gram" or "materialise".
        sum: "reuse" (of the materialised gradients), "contract" or "second-backward".
    """

    norm: str
    sum: str

    @property
    def keeps_operands(self) -> bool:
        return self.sum == "contract"

    @property
    def keeps_gradients(self) -> bool:
        return self.sum == "reuse"


@dataclass(frozen=True)
class Plan:
    """Findings of the probe and a route for each group of uses."""

    method: Method
    findings: Findings
    routes: tuple[Route, ...]
    batch_size: int
    machine: Machine = CPU

    @property
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
        return plan_table.describe(self.rows())


def make_plan(method: Method, findings: Findings, batch_size: int, device: torch.device) -> Plan:
    """Choose a route for each group.

    Raises:
        Refused: a group has no route.
    """
    machine = GPU if device.type == "cuda" else CPU
    routes = []
    for group in findings.groups:
        facts = [findings.uses[i] for i in group.uses]
        facts = [fact for fact in facts if fact.reached] or facts[:1]
        if method.capture is Capture.PLANNED:
            routes.append(_fastest(group, facts, batch_size, machine))
        else:
            routes.append(_prescribed(group, facts, method))
    return Plan(method, findings, tuple(routes), batch_size, machine)


def shape_of(fact: UseFacts) -> cost.UseShape:
    groups, positions, rows, cols = fact.size
    return cost.UseShape(positions, cols, rows, groups, picked=isinstance(fact.rule, Lookup))


def has_gram(group: Group, facts: list[UseFacts]) -> bool:
    return group.kind is not Kind.GENERAL and all(_outer(fact) for fact in facts)


def _outer(fact: UseFacts) -> bool:
    return fact.size is not None and fact.rule.has_gram(fact.layout)


def _is_direct(group: Group, facts: list[UseFacts]) -> bool:
    return group.kind is Kind.ALONE and facts[0].size is None


def _prescribed(group: Group, facts: list[UseFacts], method: Method) -> Route:
    if group.one_by_one:  # sum what was normed, after it was pulled back
        return Route("materialise", "reuse")
    gram = has_gram(group, facts)
    if gram and method.norm is Norm.CHEAPER:
        positions = sum(fact.size.positions for fact in facts)
        whole = shape_of(facts[0])
        gram = cost.gram_saves_memory(cost.UseShape(positions, whole.d_in, whole.d_out))
    elif method.norm is Norm.MATERIALISE:
        gram = False
    norm = "direct" if _is_direct(group, facts) else ("gram" if gram else "materialise")
    if method.sum is Sum.SECOND_BACKWARD:
        return Route(norm, "second-backward")
    if norm == "direct":  # as small as the parameter's own gradient is for most
        return Route(norm, "reuse")
    reuse = method.sum is Sum.REUSE or (method.sum is Sum.REUSE_OR_CONTRACT and not gram)
    return Route(norm, "reuse" if reuse else "contract")


def _fastest(group: Group, facts: list[UseFacts], batch_size: int, machine: Machine) -> Route:
    """By operations and bytes: keep and reuse, or Gram and contract (DESIGN section 3)."""
    if _is_direct(group, facts):
        return Route("direct", "reuse")
    if group.one_by_one:
        return Route("materialise", "reuse")
    if group.kind is Kind.GENERAL or not has_gram(group, facts):
        # one pull-back of the clipped sum at the end is cheaper than keeping what was pulled back
        return Route("materialise", "contract" if all(f.size for f in facts) else "reuse")
    keep = gram = 0.0
    for fact in facts:
        shape = shape_of(fact)
        product = cost.materialise(shape, batch_size)
        keep += product.flops / machine.flops_per_s + 3 * product.bytes / machine.bytes_per_s
        whole = cost.gram(shape, batch_size)
        gram += (whole.flops + cost.contract(shape, batch_size).flops) / machine.flops_per_s
        gram += 4 * whole.bytes / machine.bytes_per_s
    if group.kind is Kind.TIED:
        gram *= len(facts)
    return Route("gram", "contract") if gram < keep else Route("materialise", "reuse")
