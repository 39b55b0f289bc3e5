"""Where the examples lie: found at two small batch sizes, each example back-propagated by itself.

An axis that holds examples grows with the batch, whatever other sizes happen to equal it, and on
it the loss of one example moves that example's rows alone. Where no axis does, but every row is
moved by one example only, the data decide whose it is: the use is *routed*.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Capture, Use
from .errors import Refused, is_final
from .guards import backward, listed
from .layout import Layout, busy, candidates, only_rows_of, row_heights
from .pullback import group_uses
from .trace import CHANGING, Findings, UseFacts, describe, reroute
from .understudy import Understudy
from .uses.base import is_channels_last

#: primes, so that hardly any other size of a model is a multiple of both
SIZES = (2, 3)
ATTEMPTS = 4
#: how many halves of the examples decide between layouts
TRIALS = 4


@dataclass
class Seen:
    """One use in one pass, after each example was back-propagated by itself."""

    fact: UseFacts
    shape: torch.Size | None = None
    options: list[Layout] | None = None
    #: how many examples move each row
    movers: Tensor | None = None


@dataclass(frozen=True)
class Structure:
    """What two small batch sizes tell; ``sizes`` is one alone if the model takes no other."""

    facts: tuple[UseFacts, ...]
    layouts: dict[Any, Any]
    sizes: tuple[int, ...]
    #: of routed uses, whichever batch they were seen in
    patterns: frozenset

    def rerouted(self, pattern: tuple) -> Structure:
        """With all uses of this pattern routed; see ``reroute``."""
        facts = reroute(self.facts, pattern)
        return dataclasses.replace(self, facts=facts, patterns=self.patterns | {pattern})

    def at_size(self, capture: Capture, parameters: dict[str, Tensor]) -> Findings:
        """The findings for the batch size of ``capture``: values can vary with the examples.

        Raises:
            Refused: the uses are others than at the small sizes.
        """
        facts = []
        uses = [describe(use, capture.names, parameters) for use in capture.uses]
        for fact, known in zip(uses, self._align(uses)):
            if known is None or known.routed:
                if known is None and fact.pattern not in self.patterns:
                    raise Refused(CHANGING)
                facts.append(dataclasses.replace(fact, routed=True))
            else:
                facts.append(
                    dataclasses.replace(
                        fact,
                        layout=known.layout,
                        size=known.size,
                        shapes=known.shapes,
                        channels_last=known.channels_last,
                        routable=known.routable,
                        options=known.options,
                    )
                )
        groups = group_uses(capture.uses, capture.names, parameters)
        covered = frozenset(leaf for f in (*self.facts, *facts) if f.reached for leaf in f.leaves)
        patterns = self.patterns | {fact.pattern for fact in facts if fact.routed}
        return Findings(tuple(facts), tuple(groups), self.layouts, covered, patterns)

    def _align(self, uses: list[UseFacts]) -> list[UseFacts | None]:
        if [_called(f) for f in uses] == [_called(f) for f in self.facts]:
            return list(self.facts)
        if not self.patterns:
            raise Refused(CHANGING)
        known = _occurrences(self.facts)
        count: collections.Counter = collections.Counter()
        aligned = []
        for fact in uses:
            here = known.get(_called(fact), [])
            n = count[_called(fact)]
            count[_called(fact)] += 1
            aligned.append(here[n] if n < len(here) else None)
        return aligned


def find_structure(understudy: Understudy, batch_size: int) -> Structure:
    """Run the small batches.

    Raises:
        Refused: examples mix, or lie where they cannot be told apart.
    """
    understudy.randomise(0)
    sizes, layouts, passes = _first_passes(understudy, batch_size)
    looks = [_look(understudy, sizes[0], 0, layouts, passes.pop(0) if passes else None)]
    grown = _shapes(understudy, sizes[1], layouts, passes.pop(0) if passes else None) if sizes[1:] else None
    while len(looks) < ATTEMPTS and not _enough(looks, grown):
        looks.append(_look(understudy, sizes[0], len(looks), layouts, None))
    facts, patterns, unsteady = [], set(), []
    for seen, shapes, steady in _aligned(looks, grown):
        fact = seen[-1].fact
        single = all(s.movers is not None and (s.movers <= 1).all() for s in seen if s.options is not None)
        fact = dataclasses.replace(fact, routable=single)
        options = _surviving(seen, shapes, sizes)
        if options is None:
            facts.append(fact)
        elif options:
            unsteady += [] if steady else [fact]
            told = next(s.fact for s in seen if s.options is not None)
            more = tuple(options) if len(options) > 1 else ()
            facts.append(
                dataclasses.replace(
                    fact,
                    layout=options[0],
                    size=told.size,
                    shapes=told.shapes,
                    channels_last=told.channels_last,
                    options=more,
                )
            )
        elif single:
            facts.append(dataclasses.replace(fact, routed=True))
            patterns.add(fact.pattern)
        else:
            raise Refused(
                f"examples mix, or lie on no axis, in {fact.operation} with {listed(fact.leaves)}: "
                "one example's loss moves another's part of its gradient."
            )
    if any(fact.pattern not in patterns for fact in unsteady):
        raise Refused(CHANGING)  # whether all examples take part is no matter of routing
    structure = Structure(tuple(facts), layouts, sizes, frozenset(patterns))
    for pattern in patterns:  # some experts may have looked regular by chance
        structure = structure.rerouted(pattern)
    return structure


def resolve(understudy: Understudy, structure: Structure, size: int) -> Structure:
    """Decide between layouts that the small sizes left open, because few rows had a gradient.

    The losses of half of the examples are back-propagated, a few times over: the true layout has no other
    rows. Where several are still left, the use is treated as routed: each step finds the owners.
    """
    open_ = {id(fact): list(fact.options) for fact in structure.facts if fact.options}
    if not open_:
        return structure
    understudy.randomise(0)
    capture, losses = understudy.forward(understudy.stand_ins(size, 0), size, structure.layouts)
    uses = [describe(use, capture.names, understudy.parameters) for use in capture.uses]
    aligned = structure._align(uses)
    moved = set()

    def look(use: Use, a: Tensor | None, g: Tensor) -> None:
        fact = aligned[use.index]
        if fact is None or id(fact) not in open_:
            return
        left = []
        for option in open_[id(fact)]:
            if option.fits(g, size):
                rows = busy(g, option.axis).reshape(option.outer, size, option.inner).any(2).any(0)
                if bool(rows.any()):
                    moved.add(id(fact))
                left += [] if bool((rows & ~kept).any()) else [option]
        open_[id(fact)] = left

    capture.sink = look
    generator = torch.Generator().manual_seed(0)
    for trial in range(TRIALS):
        kept = torch.zeros(size, dtype=torch.bool)
        kept[torch.randperm(size, generator=generator)[: (size + 1) // 2]] = True
        kept = kept.to(losses.device)
        backward(capture, losses[kept].sum(), understudy.parameters, retain_graph=trial < TRIALS - 1)
    facts = []
    for fact in structure.facts:
        if id(fact) in moved:
            left = open_[id(fact)]
            if len(left) == 1:
                fact = dataclasses.replace(fact, layout=left[0], options=())
            elif fact.routable:
                fact = dataclasses.replace(fact, layout=None, size=None, routed=True, options=())
            else:
                raise Refused(CHANGING)
        facts.append(fact)
    patterns = structure.patterns | {fact.pattern for fact in facts if fact.routed}
    return dataclasses.replace(structure, facts=tuple(facts), patterns=patterns)


# ------------------------------------------------------------------ passes at the small sizes


def _first_passes(understudy: Understudy, batch_size: int):
    """The sizes, the layouts for the generic rule, and passes at each size that can still be used."""
    sizes, passes = _sizes_and_passes(understudy, batch_size)
    layouts = _generic_layouts([capture.generic for capture, _ in passes], sizes)
    return sizes, layouts, [] if layouts else passes


def _sizes_and_passes(understudy: Understudy, batch_size: int):
    """With mixed rows or, if the model accepts only such as it was given, with those."""
    for plain in (False, True):
        understudy.stand_ins.plain = plain
        for sizes in (SIZES, (batch_size,)):
            try:
                return sizes, [
                    understudy.forward(understudy.stand_ins(s, i), s, None) for i, s in enumerate(sizes)
                ]
            except Exception as error:
                if is_final(error):
                    raise
                failure = error
    with torch.no_grad():  # an error of the model's own, if it fails without being watched, too
        understudy.loss_fn(understudy.model, understudy.stand_ins(batch_size, 0))
    raise Refused(f"the forward pass cannot be followed ({failure}).") from failure


def _look(understudy: Understudy, size: int, attempt: int, layouts, ready) -> list[Seen]:
    if ready is None:
        understudy.randomise(attempt)
        ready = understudy.forward(understudy.stand_ins(size, attempt), size, layouts, draw=attempt)
    capture, losses = ready
    found = [Seen(describe(use, capture.names, understudy.parameters)) for use in capture.uses]
    example = 0

    def look(use: Use, a: Tensor | None, g: Tensor) -> None:
        seen = found[use.index]
        if seen.options is None:
            seen.shape, seen.options = g.shape, candidates(g.shape, size, use.rule.features)
            sized = use.rule.size(use.value.shape, a, g, size)
            shapes = (None if a is None else a.shape, g.shape)
            seen.fact = dataclasses.replace(
                seen.fact, size=sized, shapes=shapes, channels_last=a is not None and is_channels_last(a)
            )
        rows = {axis: busy(g, axis) for axis in {layout.axis for layout in seen.options}}
        seen.options = [o for o in seen.options if only_rows_of(example, rows[o.axis], o, size)]
        moved = row_heights(g, use.rule.row_axes(g)).ne(0).byte()
        seen.movers = moved if seen.movers is None else seen.movers + moved

    capture.sink = look
    for example in range(size):
        backward(capture, losses[example], understudy.parameters, retain_graph=example < size - 1)
    return found


def _shapes(understudy: Understudy, size: int, layouts, ready) -> list[Seen]:
    if ready is None:
        understudy.randomise(0)
        ready = understudy.forward(understudy.stand_ins(size, 1), size, layouts)
    capture, losses = ready
    found = [Seen(describe(use, capture.names, understudy.parameters)) for use in capture.uses]

    def measure(use: Use, a: Tensor | None, g: Tensor) -> None:
        found[use.index].shape = g.shape

    capture.sink = measure
    backward(capture, losses.sum(), understudy.parameters, retain_graph=False)
    return found


# ------------------------------------------------------------------ from passes to facts


def _called(fact: UseFacts) -> tuple:
    """What a use is called in every batch."""
    return fact.operation, fact.leaves


def _occurrences(facts: Iterable[UseFacts]) -> dict[tuple, list[UseFacts]]:
    found: dict[tuple, list[UseFacts]] = {}
    for fact in facts:
        found.setdefault(_called(fact), []).append(fact)
    return found


def _enough(looks: list[list[Seen]], grown: list[Seen] | None) -> bool:
    """Whether all is seen: a gradient for each use, or, where uses come and go, as many passes as may be."""
    names = [[_called(s.fact) for s in each] for each in (*looks, *([grown] if grown else []))]
    return all(each == names[0] for each in names) and all(s.options is not None for s in looks[-1])


def _aligned(looks: list[list[Seen]], grown: list[Seen] | None):
    """For each use: what each pass saw of it, its shape at the second size, whether it is always there.

    Where passes differ in their uses, they are aligned by name.
    """
    passes = [*looks, *([grown] if grown else [])]
    names = [[_called(s.fact) for s in each] for each in passes]
    if all(each == names[0] for each in names):
        later = [[s.shape] for s in grown] if grown else [[] for _ in looks[0]]
        return [([look[i] for look in looks], later[i], True) for i in range(len(looks[0]))]
    slots = []
    for name in dict.fromkeys(n for each in names for n in each):
        mine = [[s for s in each if _called(s.fact) == name] for each in passes]
        steady = len({len(each) for each in mine}) == 1
        for n in range(max(map(len, mine[: len(looks)]))):
            seen = [each[n] for each in mine[: len(looks)] if n < len(each)]
            slots.append((seen, [mine[-1][n].shape] if grown and steady else [], steady))
    return slots


def _surviving(seen: list[Seen], grown: list[torch.Size | None], sizes) -> list[Layout] | None:
    """Layouts that every pass and the second size allow; None if no gradient ever came."""
    arrived = [s for s in seen if s.options is not None]
    if not arrived:
        return None
    if len({s.shape for s in arrived}) > 1:
        return []
    options = [o for o in arrived[0].options or [] if all(o in (s.options or []) for s in arrived)]
    for shape in grown:
        if shape is not None:
            options = [o for o in options if len(shape) > o.axis and shape[o.axis] == o.rows(sizes[1])]
    return options


def _generic_layouts(seen: list[list[Any]], sizes: tuple[int, ...]) -> dict[Any, Any]:
    """Where the generic rule finds the examples: the axes that differ between two sizes."""
    if not seen[0]:
        return {}
    if len(sizes) < 2:
        raise Refused(
            f"{seen[0][0][0]} has no rule of its own, and the model takes batches of one size only."
        )

    def axis(small: tuple, large: tuple, name: str) -> int | None:
        grown = [i for i, (s, t) in enumerate(zip(small, large)) if s != t]
        fits = all(s * sizes[1] == t * sizes[0] for s, t in zip(small, large) if s != t)
        if len(grown) > 1 or not fits:
            raise Refused(f"{name} has no rule of its own and its examples lie on no single axis.")
        return grown[0] if grown else None

    layouts: dict[Any, Any] = {}
    for position, (small, large) in enumerate(zip(*seen)):
        name = small[0]
        inputs = [axis(s, t, name) for s, t in zip(small[1], large[1])]
        outputs = [axis(s, t, name) for s, t in zip(small[2], large[2])]
        if None in outputs:
            raise Refused(f"{name} with parameters has an output without an axis of examples.")
        layouts[("generic", position)] = (inputs, outputs)
    return layouts
