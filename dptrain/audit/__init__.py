"""Empirical lower bounds on ε: what an adversary finds out, for our engines and for other libraries."""

from dptrain.audit.record import AuditRecord
from dptrain.audit.run import run
from dptrain.audit.spec import KINDS, Audit

__all__ = ["KINDS", "Audit", "AuditRecord", "run"]
