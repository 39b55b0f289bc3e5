"""What a run releases: on record before it exists for anyone, repeated bit for bit or paid for again.

A step may be taken twice: the process dies after its release, and goes on from the checkpoint before. Either
the second time is the first one again, bit for bit, and free; or nothing of the first is used again, and it
is paid for. The same noise on a different sum would tell the difference of the sums.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.core import accounting, checks
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger, Release
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import StepSpec

Numbers = Callable[[], Mapping[str, npt.NDArray[Any]]]
"""A noisy gradient by parameter name, brought to the host when it is asked for."""


class NotTheSame(Exception):
    """A repeated step came out with other bits: on another machine, with other libraries, or after others."""


class Releases:
    """The releases of one run, on its ledger if it has one, and the key that they are drawn with.

    Attributes:
        key: that samples and noise of the next steps are derived from.
        repeats: whether lost steps are repeated bit for bit, if they can be.

    Raises:
        TypeError: the ledger is not one.
        ValueError: it is accounted under another neighbouring relation than the mechanism.
    """

    def __init__(self, mechanism: Mechanism, ledger: Ledger | None, key: Key, *, repeats: bool) -> None:
        if ledger is not None and not isinstance(ledger, Ledger):
            raise TypeError(
                f"a ledger is a dptrain.core.ledger.Ledger, and this is a {type(ledger).__name__}."
            )
        if ledger is not None and ledger.neighbours != mechanism.neighbours:
            raise ValueError(
                f"the ledger's releases are accounted under '{ledger.neighbours}', and the mechanism's under "
                f"'{mechanism.neighbours}': use a ledger of its own."
            )
        self.key, self.repeats = key, repeats
        self._mechanism, self._ledger, self._first_key = mechanism, ledger, key
        self._planned = Counter[StepSpec]()
        for spec, count in mechanism.segments:
            self._planned[spec] += count
        self._made = Counter[StepSpec]()
        self._last: tuple[int, StepSpec] | None = None
        self._periods = self._counted = 0
        self._count_what_is_on_record()
        self._known = {} if ledger is None or not repeats else _fingerprints(ledger.releases)

    @property
    def count(self) -> int:
        """How many there are."""
        return self._made.total()

    def may_go_on(self, index: int) -> bool:
        """Whether the mechanism has a step of this index, and it can be afforded."""
        if index >= self._mechanism.steps:
            return False
        self._count_what_is_on_record()
        return index in self._known or self._is_covered(index, self._mechanism.step(index))

    def before(self, index: int, spec: StepSpec, numbers: Numbers) -> None:
        """Put a release on record that is about to be made; on disk when this returns.

        Args:
            index: of the step, from 0.
            numbers: what is about to be released.

        Raises:
            NotTheSame: with a key that lost steps are repeated with, this one came out otherwise. Nothing
                was recorded, and nothing of it may be used: call `draw_afresh`.
            RuntimeError: it would cost more than the mechanism does.
            OSError: it cannot be put on record.
        """
        mark = fingerprint(numbers()) if self.repeats else None
        if index in self._known:
            if mark in self._known[index]:
                return  # it has been paid for
            raise NotTheSame
        self._count_what_is_on_record()
        if not self._is_covered(index, spec):
            raise RuntimeError("a step would cost more than the run may spend; it was not released.")
        if self._ledger is None:
            self._count(index, spec)
        else:
            self._ledger.append(index, spec, mark)
            self._count_what_is_on_record()

    def draw_afresh(self) -> None:
        """Go on with a key that no release was drawn with.

        Raises:
            ValueError: the batches or the noise of the mechanism depend on those of lost steps.
        """
        if self.count and (self._mechanism.is_correlated or _periods(self._mechanism)):
            raise ValueError(
                "a step did not come out as before, bit for bit, and what depends on earlier steps "
                "(correlated noise, shuffled epochs) cannot be drawn afresh: the run ends with the steps "
                "that it has."
            )
        self._known = {}
        own = self._first_key
        # The number grows with each release: none was drawn with this child.
        self.key = own.child("afresh", self.count) if own.reproducible else Key.from_entropy()

    def _is_covered(self, index: int, spec: StepSpec) -> bool:
        """Whether one more release, of step `index`, and all on record cost at most what the mechanism does.

        Releases that were lost with the steps they led to are paid for all the same: a run that repeats
        steps with fresh randomness ends earlier.
        """
        if spec.noise_multiplier == 0 and self._planned[spec]:
            return True  # there is nothing to spend
        if spec.sampling.period is not None:
            return self._period_is_covered(index, spec, spec.sampling.period)
        if self._made[spec] < self._planned[spec] and self._made <= self._planned:
            return True
        delta = self._mechanism.delta
        if self._mechanism.is_constant or delta is None:
            return False
        earlier = () if self._ledger is None else self._ledger.segments
        segments = accounting.merge([*earlier, (spec, 1)])
        cost = accounting.epsilon(segments, delta, self._mechanism.neighbours)
        return cost <= self._mechanism.epsilon(delta)

    def _period_is_covered(self, index: int, spec: StepSpec, period: int) -> bool:
        """Of epochs or cycles, which cost the same each, whether there are no more than the mechanism has."""
        planned = math.ceil(self._mechanism.steps / period)
        begins = accounting.begins_period(self._last, index, spec)
        return self._made.keys() <= {spec} and self._periods + begins <= planned

    def _count_what_is_on_record(self) -> None:
        """Also what another training has put on the ledger since."""
        if self._ledger is None:
            return
        for release in self._ledger.releases[self._counted :]:
            self._count(release.step, release.spec)
            self._counted += 1

    def _count(self, index: int, spec: StepSpec) -> None:
        self._made[spec] += 1
        self._periods += accounting.begins_period(self._last, index, spec)
        self._last = index, spec


def releases_of(mechanism: Mechanism, ledger: Ledger | None, key: Key | None, taken: int) -> Releases:
    """The releases of a training in a loop of the user's own.

    Args:
        ledger: on which they are recorded, if they are.
        key: the user's, so that lost steps can be repeated; None for one that nobody has.
        taken: steps that have been taken before.

    Raises:
        TypeError, ValueError: one of them is of no use.
    """
    if key is not None and not isinstance(key, Key):
        raise TypeError("key must be a dptrain.core.entropy.Key: Key.from_entropy() makes one.")
    if taken and key is None and _needs_the_key(mechanism, taken):
        raise ValueError(
            "the next step's batch or noise depends on those of earlier steps: go on with the same key."
        )
    repeats = key is not None and ledger is not None
    releases = Releases(mechanism, ledger, key or Key.from_entropy(), repeats=repeats)
    if checks.whole("taken", taken, minimum=0) > releases.count:
        raise ValueError(
            f"{taken} steps were taken, but the ledger has fewer releases: pass the ledger that they are on."
        )
    return releases


def _needs_the_key(mechanism: Mechanism, taken: int) -> bool:
    """Whether noise is correlated, or the next step is in the middle of a shuffled epoch or a cycle: drawn
    with another key, an example could be in it twice, and would be paid for once."""
    return mechanism.is_correlated or any(taken % period for period in _periods(mechanism))


def _periods(mechanism: Mechanism) -> set[int]:
    """Steps of a shuffled epoch or a cycle, of the samplers that have any."""
    found = {spec.sampling.period for spec, _ in mechanism.segments}
    return {period for period in found if period is not None}


def fingerprint(gradient: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of all names, types, shapes and bits, in hexadecimal.

    It is computed from what is released, so it may be published.
    """
    digest = hashlib.sha256()
    for name in sorted(gradient):
        numbers = np.ascontiguousarray(gradient[name])
        digest.update(json.dumps([name, str(numbers.dtype), list(numbers.shape)]).encode())
        digest.update(numbers.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _fingerprints(releases: Iterable[Release]) -> dict[int, set[str]]:
    """By step: what has been released, as far as it can be known again."""
    found: dict[int, set[str]] = {}
    for release in releases:
        if release.fingerprint is not None:
            found.setdefault(release.step, set()).add(release.fingerprint)
    return found
