"""What a run releases: on record before it exists for anyone, repeated bit for bit or paid for again."""

from __future__ import annotations

from dptrain.core.entropy import Key
from dptrain.core.key_file import forget, keep, kept, key_path
from dptrain.core.ledger import Ledger
from dptrain.core.restart import Allowance, fingerprints
from dptrain.core.spec import StepSpec
from dptrain.training.fingerprint import fingerprint
from dptrain.training.loop import Numbers
from dptrain.training.prepare import Run


class NotTheSame(Exception):
    """A repeated step came out with other bits: on another machine, with other libraries, or after others."""


class Releases:
    """The releases of one run and the key that they are drawn with.

    A step may be taken twice: the process dies after its release, and goes on from the checkpoint before.
    Either the second time is the first one again, bit for bit, and free; or nothing of the first is used
    again, and it is paid for. The same noise on a different sum would tell the difference of the sums.

    Attributes:
        key: for `Learner.steps`.
        ledger: all releases so far.
    """

    def __init__(self, run: Run, ledger: Ledger) -> None:
        self._run, self.ledger, self.key = run, ledger, run.key
        self._allowance = Allowance(run.mechanism, ledger)
        self._made: dict[int, set[str]] = fingerprints(ledger)

    @property
    def repeats(self) -> bool:
        """Whether lost steps are repeated bit for bit, if they can be."""
        return self.key.reproducible or self._run.config.restart == "replay"

    @property
    def _key_file_is_needed(self) -> bool:
        return self.repeats and not self.key.reproducible

    def begin(self) -> None:
        """Before the first release of the run."""
        if self._key_file_is_needed:
            keep(self.key, key_path(self.ledger.run))

    def go_on(self) -> str | None:
        """Before the first release of a resumed run: what there is to say about its key.

        Raises:
            ValueError: others may have read the key that was kept.
        """
        if not self._key_file_is_needed:
            return None
        path = key_path(self.ledger.run)
        try:
            self.key = kept(path)
        except FileNotFoundError:
            keep(self.key, path)
            return f"The run's key is not in {path}: lost steps are drawn afresh and paid for again."
        return None

    def end(self) -> None:
        """After the last release: nobody needs the key any more."""
        forget(key_path(self.ledger.run))

    def may_go_on(self, index: int) -> bool:
        """Whether the run has a step of this index and can afford it."""
        mechanism = self._run.mechanism
        if index >= mechanism.steps:
            return False
        repeated = self.repeats and index in self._made
        return repeated or not self._run.is_private or self._allowance.covers(mechanism.step(index))

    def before(self, index: int, spec: StepSpec, numbers: Numbers) -> None:
        """As `dptrain.training.loop.BeforeRelease`.

        Raises:
            NotTheSame: this step has been released with this key, and was another one.
            RuntimeError: it would cost more than the run may spend.
            OSError: it cannot be put on record.
        """
        mark = fingerprint(numbers()) if self.repeats else None
        if mark is not None and index in self._made:
            if mark in self._made[index]:
                return  # it has been paid for
            raise NotTheSame
        if self._run.is_private and not self._allowance.covers(spec):
            raise RuntimeError("a step would cost more than the run may spend; it was not released.")
        self.ledger.append(index, spec, mark)
        self._allowance.count(spec)

    def draw_afresh(self) -> None:
        """Go on with a key that no release was drawn with."""
        self._made = {}
        number = len(self.ledger.releases)  # grows with each release: no number has two
        self.key = self._run.key.child("afresh", number) if self.key.reproducible else Key.from_entropy()
        self.begin()
