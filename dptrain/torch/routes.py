"""A route: how a use's part of the norms is formed, and its part of the sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import standardised
from .pullback import Group, Kind

if TYPE_CHECKING:
    from .trace import UseFacts


@dataclass(frozen=True)
class Machine:
    """What a device can do: operations and bytes a second. Only their ratio matters here."""

    flops_per_s: float
    bytes_per_s: float


#: two AVX-512 cores, and a data-centre GPU: for uses too small to be worth a measurement
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

    def __str__(self) -> str:
        return f"{self.norm}+{self.sum}"

    @property
    def keeps_operands(self) -> bool:
        return self.sum == "contract"

    @property
    def keeps_gradients(self) -> bool:
        return self.sum == "reuse"


DIRECT = Route("direct", "reuse")


def has_gram(group: Group, facts: list[UseFacts]) -> bool:
    """Whether the norms of a group can be had without its gradients."""
    if group.kind is Kind.GENERAL or not all(_outer(fact) for fact in facts):
        return False
    return group.kind is not Kind.STANDARDISED or standardised.has_gram(facts[0].rule)


def _outer(fact: UseFacts) -> bool:
    return fact.size is not None and fact.rule.has_gram(fact.layout)


def is_direct(group: Group, facts: list[UseFacts]) -> bool:
    """Whether its per-example gradients are reductions of what arrives: there is nothing to choose."""
    return group.kind is Kind.ALONE and facts[0].size is None
