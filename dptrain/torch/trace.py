"""What the probe learnt of each use, and the check that a step does what the probe saw."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Capture, Use
from .errors import Changed
from .layout import Placement
from .pullback import Group, Kind, at_leaves, geometry, group_uses, leaves_of, within

CHANGING = (
    "the operations of the model change from call to call, so its gradients cannot be assigned to "
    "examples: make them the same for every batch of one shape."
)


@dataclass(frozen=True)
class UseFacts:
    """What the probe learnt of one use.

    Attributes:
        layout: where the examples lie; None if no gradient ever reaches it, or if ``routed`` and
            not yet settled for a batch.
        routed: the data decide which rows it sees.
        options: further layouts that the small sizes allow, where few rows had a gradient.
        shapes: of the other operand (None if there is none) and of the output at a small batch size.
        channels_last: whether the other operand lies so in memory.
        routable: each of its rows is moved by one example, so that it could be routed.
        geometry: which elements of its leaf the value shows, if it is a view of one.
    """

    leaves: tuple[str, ...]
    operation: str
    rule: Any
    value: torch.Size
    layout: Placement | None
    size: Any
    geometry: tuple | None = None
    routed: bool = False
    routable: bool = False
    options: tuple[Placement, ...] = ()
    shapes: tuple[torch.Size | None, torch.Size] | None = None
    channels_last: bool = False

    @property
    def reached(self) -> bool:
        """Whether a gradient reaches it."""
        return self.routed or self.layout is not None

    @property
    def where(self) -> str:
        """Where the examples lie, for people."""
        if self.layout is not None:
            return str(self.layout)
        return "by routing" if self.routed else "no gradient"

    @property
    def trace(self) -> tuple:
        return self.operation, self.rule, self.value, self.leaves

    @property
    def pattern(self) -> tuple:
        """What routed uses have in common, whichever expert they belong to."""
        return self.operation, type(self.rule), self.value


@dataclass(frozen=True)
class Findings:
    """The structure of a model's forward pass for one input signature.

    Where some uses are routed, ``uses`` and ``groups`` are those of one batch: the data decide
    which of the routed ones there are.

    Attributes:
        patterns: what routed uses look like.
    """

    uses: tuple[UseFacts, ...]
    groups: tuple[Group, ...]
    layouts: dict[Any, Any]
    covered: frozenset[str]
    patterns: frozenset = frozenset()

    @functools.cached_property
    def shared(self) -> tuple[int, ...]:
        """Uses of leaves that have several, which rely on which elements each of them shows."""
        count = collections.Counter(leaf for fact in self.uses for leaf in fact.leaves)
        general = {i for g in self.groups if g.kind is Kind.GENERAL for i in g.uses}
        return tuple(i for i, fact in enumerate(self.uses) if i not in general and count[fact.leaves[0]] > 1)

    @functools.cached_property
    def routed(self) -> bool:
        return any(fact.routed for fact in self.uses)

    @property
    def routed_leaves(self) -> frozenset[str]:
        return frozenset(leaf for fact in self.uses if fact.routed for leaf in fact.leaves)

    def at_leaves(self) -> Findings:
        """With all gradients of single examples pulled back to the leaves."""
        return dataclasses.replace(self, groups=at_leaves(self.groups))

    def within(self, part_of: Mapping[str, int]) -> Findings:
        """The same for values whose leaves belong to different parts of a clip rule, by name of the leaf."""
        return dataclasses.replace(self, groups=within(self.groups, part_of))

    def rerouted(self, pattern: tuple) -> Findings:
        """With all uses of this pattern routed; see ``reroute``."""
        uses = reroute(self.uses, pattern)
        return dataclasses.replace(self, uses=uses, patterns=self.patterns | {pattern})


def reroute(facts: tuple[UseFacts, ...], pattern: tuple) -> tuple[UseFacts, ...]:
    """With all uses of this pattern routed.

    Raises:
        Refused: some have rows that two examples move.
    """
    if not all(fact.routable for fact in facts if fact.pattern == pattern and fact.reached):
        raise Changed(CHANGING)
    return tuple(
        dataclasses.replace(fact, layout=None, size=None, routed=True, options=())
        if fact.pattern == pattern
        else fact
        for fact in facts
    )


def describe(use: Use, names: dict[int, str], parameters: dict[str, Tensor]) -> UseFacts:
    """What a use tells by itself, before any gradient has come."""
    leaves = leaves_of(use.value, names)
    view = geometry(use.value, parameters[leaves[0]])
    return UseFacts(leaves, use.operation, use.rule, use.value.shape, None, None, view)


def names(facts: tuple[UseFacts, ...]) -> list[tuple]:
    """A name for each use that tells the same one in another batch.

    Routed uses come and go, and which of several is which cannot be told: they share a name.
    """
    count: collections.Counter = collections.Counter()
    called: list[tuple] = []
    for fact in facts:
        name = (fact.operation, fact.leaves)
        if fact.routed:
            called.append((*name, fact.geometry))
        else:
            called.append((*name, count[name]))
            count[name] += 1
    return called


def match(findings: Findings, capture: Capture, parameters: dict[str, Tensor]) -> tuple[UseFacts, ...]:
    """The facts about each use of a forward pass.

    Raises:
        Refused: it does other than what the probe saw.
    """
    names = capture.names
    if findings.routed:
        return _match_routed(findings, capture, parameters)
    trace = [(u.operation, u.rule, u.value.shape, leaves_of(u.value, names)) for u in capture.uses]
    if trace != [fact.trace for fact in findings.uses]:
        raise Changed(CHANGING)
    seen = [geometry(u.value, parameters[f.leaves[0]]) for u, f in zip(capture.uses, findings.uses)]
    if seen != [fact.geometry for fact in findings.uses]:
        raise Changed(CHANGING)
    if any(seen[index] is None for index in findings.shared):
        # a copied slice does not tell where it was taken from: look at all of them again
        again = group_uses(capture.uses, names, parameters)
        if [(g.kind, g.uses) for g in again] != [(g.kind, g.uses) for g in findings.groups]:
            raise Changed(CHANGING)
    return findings.uses


def _match_routed(findings: Findings, capture: Capture, parameters) -> tuple[UseFacts, ...]:
    """Routed uses come and go; all others must be there, in their order."""
    regular = [fact for fact in findings.uses if not fact.routed]
    called = {(fact.operation, fact.leaves) for fact in regular}
    due = iter(regular)
    facts = []
    for use in capture.uses:
        fact = describe(use, capture.names, parameters)
        if (fact.operation, fact.leaves) in called:
            known = next(due, None)
            if known is None or (known.trace, known.geometry) != (fact.trace, fact.geometry):
                raise Changed(CHANGING)
            facts.append(known)
        elif fact.pattern in findings.patterns:
            facts.append(dataclasses.replace(fact, routed=True))
        else:
            raise Changed(CHANGING)
    if next(due, None) is not None:
        raise Changed(CHANGING)
    return tuple(facts)
