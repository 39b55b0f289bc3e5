"""What adversaries found out, drawn: error rates, and bounds beside what is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dptrain.audit.profile import Profile, profile_of
from dptrain.audit.record import AuditRecord
from dptrain.core.mechanism import Mechanism

_FLOOR = 1e-5


def draw(records: Sequence[AuditRecord], path: Path) -> None:
    """One PNG for all records that are ok; all of one claim.

    Left: false positive and false negative rates of the first adversary of each, without a margin, and the
    curve below which no adversary comes if all is as stated. Right: every bound of each, and the largest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [record for record in records if record.status == "ok"]
    claimed = records[0].case
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.8 + max(3.0, 0.32 * len(records))), layout="constrained"
    )
    stated = profile_of(Mechanism.from_dict(records[0].results["mechanism"]))
    little = np.geomspace(_FLOOR, 0.5, 150)
    positive = np.concatenate([little, 1 - little[::-1]])
    left.loglog(positive, least_false_negatives(stated, positive), "k--", label="as stated: nobody below")
    for record in records:
        seen = record.results["trade_off"]
        x, y = np.array(seen["false_positive_rate"]), np.array(seen["false_negative_rate"])
        left.plot(np.maximum(x, _FLOOR), np.maximum(y, _FLOOR), label=record.case.subject, lw=1.2)
    left.set(xlim=(_FLOOR, 1), ylim=(1e-3, 1.2), xlabel="false positive rate", ylabel="false negative rate")
    left.set_title(f"{claimed.kind}: {records[0].results['trade_off']['adversary']}", fontsize=10)
    left.legend(fontsize=8)
    for row, record in enumerate(records):
        colour = "tab:red" if record.refuted else "tab:blue"
        found = [finding["epsilon"] for finding in record.results["findings"]]
        right.scatter(found, [row] * len(found), s=14, color=colour, alpha=0.3)
        right.barh(row, record.epsilon, height=0.5, color=colour, alpha=0.5)
    right.axvline(claimed.epsilon, color="k", ls="--", label=f"claimed: {claimed.epsilon:g}")
    right.set_yticks(range(len(records)), [record.case.subject for record in records], fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(0, None), xlabel=f"lower bounds on ε at δ = {claimed.delta:g}")
    right.set_title(f"confidence {100 * claimed.confidence:g} %", fontsize=10)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def least_false_negatives(profile: Profile, false_positive_rate: np.ndarray) -> np.ndarray:
    """The trade-off function (Dong, Roth and Su 2019, arXiv 1905.02383) at these false positive rates."""
    ours, grown = false_positive_rate[:, None], np.exp(profile.epsilons)
    one = 1 - profile.deltas - grown * ours
    other = (1 - profile.deltas - ours) / grown
    return np.maximum(np.maximum(one, other).max(1), 0)
