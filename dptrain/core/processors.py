"""The processors of this machine: what they are called, and how busy they are."""

import contextlib
import os
import time
from pathlib import Path

#: how long to look, and how much of it one core may be busy on a machine that is ours alone
_LOOK_S, _QUIET = 0.1, 0.3


def processor() -> str:
    """The processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


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

    Processes whose threads spin take the cores from each other; on a quiet machine to wake a thread costs
    more than a small model's operation. OpenMP reads this when PyTorch loads; whoever set it keeps their
    choice.
    """
    if "OMP_WAIT_POLICY" not in os.environ and others_at_work():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
