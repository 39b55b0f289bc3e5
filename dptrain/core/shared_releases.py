"""The releases of a training of several processes: the first keeps the record, and all do as it says."""

from __future__ import annotations

from collections.abc import Callable

from dptrain.core.entropy import Key
from dptrain.core.releases import NotTheSame, Numbers, Releases
from dptrain.core.spec import StepSpec
from dptrain.core.team import Team


class SharedReleases:
    """Like `Releases`; every method is called by all processes, in the same order.

    Attributes:
        key: the first one's, on all.
        repeats: as of `Releases`.
        count: releases on record.

    Args:
        make: the releases; called by the first process alone, which has the ledger.
        team: the processes.
    """

    def __init__(self, make: Callable[[], Releases], team: Team) -> None:
        self._team = team
        self._own: Releases | None = None

        def begin() -> None:
            self._own = make()

        team.lead(begin)
        self._hear()

    def may_go_on(self, index: int) -> bool:
        """As of `Releases`."""
        return self._team.lead(lambda: self._first.may_go_on(index))

    def before(self, index: int, spec: StepSpec, numbers: Numbers) -> None:
        """As of `Releases`: on every process, it returns when the release is on record.

        Raises:
            NotTheSame: on all, and `draw_afresh` is to be called by all.
            RankLost: the first could not put it on record.
        """
        given = numbers() if self.repeats else {}  # maybe brought together by all

        def record() -> int | None:
            try:
                self._first.before(index, spec, lambda: given)
            except NotTheSame:
                return None
            return self._first.count

        count = self._team.lead(record)
        if count is None:
            raise NotTheSame
        self.count = count

    def draw_afresh(self) -> None:
        """As of `Releases`.

        Raises:
            RankLost: on the others, where it cannot be.
        """
        self._team.lead(lambda: self._first.draw_afresh())
        self._hear()

    @property
    def _first(self) -> Releases:
        assert self._own is not None, "only the first process has them"
        return self._own

    def _hear(self) -> None:
        """The first one's key, whether it repeats, and how many releases there are."""
        own, said = self._own, None
        if own is not None:
            said = [own.key.secret_hex(), own.key.reproducible, own.repeats, own.count]
        secret, reproducible, self.repeats, self.count = self._team.tell(said)
        self.key = Key(bytes.fromhex(secret), reproducible=reproducible)
