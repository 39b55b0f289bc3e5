"""How busy the processors of this machine are."""

import os
import time
from pathlib import Path

#: how long to look, and how much of it one core may be busy on a machine that is ours alone
_LOOK_S, _QUIET = 0.1, 0.3


def busy_s() -> float | None:
    """Busy seconds of all cores since boot: user, nice, system, irq, softirq, steal; None where the system
    does not tell."""
    try:
        times = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, times)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def others_at_work() -> bool:
    """Whether other processes keep a core busy just now; True where the system does not tell."""
    before = busy_s()
    time.sleep(_LOOK_S)  # in which this process does nothing
    after = busy_s()
    return before is None or after is None or after - before > _QUIET * _LOOK_S


def share_threads() -> None:
    """Have OpenMP's threads sleep while they wait for each other if others are at work, else let them spin.

    Two processes whose threads spin take the cores from each other and take many times as long; on a quiet
    machine waking a thread costs more than most operations of a small model. OpenMP reads this when PyTorch
    loads; whoever set it keeps their choice.
    """
    if "OMP_WAIT_POLICY" not in os.environ and others_at_work():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
