"""What a checkpoint says beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from dptrain.core import checks
from dptrain.core.ledger import Mark
from dptrain.core.remembered import Consulted
from dptrain.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Facts:
    """Where a run was, and what it was.

    Attributes:
        identity: what must be the same when the run goes on (`dptrain.training.identity`).
        ledger: how far it was.
        learner: numbers of `dptrain.training.learner.State`.
        measured: by which the run was planned.
        metrics_bytes: how long the metrics were.
        physical_batch_size: in examples.
        training_s: seconds of training, in all processes that the run had.
    """

    identity: dict[str, Any]
    ledger: Mark
    learner: dict[str, Any]
    measured: Consulted
    metrics_bytes: int
    physical_batch_size: int
    training_s: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Facts:
        """What `to_dict` described.

        Raises:
            CheckpointError: it says something else.
        """
        try:
            checks.known_keys("a checkpoint", data, [field.name for field in fields(cls)])
            ledger = checks.known_keys("its ledger", data["ledger"], ("length", "link"))
            return cls(
                identity=_table(data["identity"]),
                ledger=Mark(checks.whole("length", ledger["length"], minimum=0), str(ledger["link"])),
                learner=_table(data["learner"]),
                measured={
                    name: {
                        key: checks.non_negative("a measurement", value)
                        for key, value in _table(numbers).items()
                    }
                    for name, numbers in _table(data["measured"]).items()
                },
                metrics_bytes=checks.whole("metrics_bytes", data["metrics_bytes"], minimum=0),
                physical_batch_size=checks.whole("physical_batch_size", data["physical_batch_size"]),
                training_s=checks.non_negative("training_s", data["training_s"]),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not say what a run needs: {error}") from error


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a table of values is needed, and it has {checks.shown(value)}.")
    return value
