"""What came of an audit: an immutable file, ``FOLDER/records/ID.json``, with the fields of every record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dptrain.audit.spec import Audit
from dptrain.bench.record import FORMAT, Record


@dataclass(frozen=True)
class AuditRecord(Record):
    """One audit, done.

    ``results`` holds ``findings``, each a bound; ``epsilon``, the largest of them; ``mechanism``; and
    ``trade_off``, error rates as they were seen.
    """

    case: Audit  # type: ignore[assignment]

    @property
    def epsilon(self) -> float:
        """The lower bound."""
        return self.results["epsilon"]

    @property
    def refuted(self) -> bool:
        """Whether the claim is."""
        return self.status == "ok" and self.epsilon > self.case.epsilon

    @property
    def best(self) -> dict[str, Any]:
        """The finding that bounds most."""
        return max(self.results["findings"], key=lambda finding: finding["epsilon"])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuditRecord:
        """Raises ValueError for a record of another format."""
        if values.get("format") != FORMAT:
            raise ValueError(f"a record of format {values.get('format')!r} cannot be read; {FORMAT} can.")
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        fields |= {"case": Audit.from_dict(values["case"]), "warnings": tuple(values["warnings"])}
        return cls(**fields)
