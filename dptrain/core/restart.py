"""What a run may still release after it was interrupted."""

from __future__ import annotations

from collections import Counter

from dptrain.core import accounting
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import StepSpec


class Allowance:
    """The releases of one mechanism, on one ledger.

    Releases that were lost with the steps they led to are paid for all the same. So a run that repeats
    steps with fresh randomness ends earlier: what is on record never costs more than the mechanism.
    """

    def __init__(self, mechanism: Mechanism, ledger: Ledger) -> None:
        self._mechanism, self._ledger = mechanism, ledger
        self._planned = Counter[StepSpec]()
        for spec, count in mechanism.segments:
            self._planned[spec] += count
        self._made = Counter(release.spec for release in ledger.releases)

    def covers(self, spec: StepSpec) -> bool:
        """Whether one more release of `spec` costs, with all on record, at most what the mechanism does."""
        if self._made[spec] < self._planned[spec] and self._made <= self._planned:
            return True
        delta = self._mechanism.delta
        if self._mechanism.is_constant or delta is None:
            return False
        segments = accounting.merge([*self._ledger.segments, (spec, 1)])
        cost = accounting.epsilon(segments, delta, self._mechanism.neighbours)
        return cost <= self._mechanism.epsilon(delta)

    def count(self, spec: StepSpec) -> None:
        """A release of `spec` has been put on record."""
        self._made[spec] += 1


def fingerprints(ledger: Ledger) -> dict[int, set[str]]:
    """By step: what has been released, as far as it can be known again."""
    found: dict[int, set[str]] = {}
    for release in ledger.releases:
        if release.fingerprint is not None:
            found.setdefault(release.step, set()).add(release.fingerprint)
    return found
