"""Where a figure comes from: commit, versions, processor, and who else was at work."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dptrain import __version__
from dptrain.core.processors import busy_s, processor

PACKAGE = Path(__file__).resolve().parent.parent
#: those whose versions every record tells
PACKAGES = ("torch", "timm", "transformers", "jax", "jaxlib", "optax", "numpy")


def environment(device: str = "cpu", packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Commit (and whether the code differs from it), versions, the machine and its threads."""
    return {
        "dptrain": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--", ".")),
        "versions": {name: version for name in packages if (version := version_of(name))},
        "python": platform.python_version(),
        "device": device,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says in the folder of the package; None outside of a repository."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def without_places(traceback: str) -> str:
    """A traceback whose paths begin at the repository or the interpreter's libraries."""
    root = str(PACKAGE.parent) + os.sep
    return traceback.replace(root, "").replace(sys.prefix + os.sep, "")


def machine(device: str) -> dict[str, Any]:
    """Architecture, cores, processor and its vector instructions, and the GPU where one is used."""
    found: dict[str, Any] = {"architecture": platform.machine(), "cores": os.cpu_count()}
    found["processor"] = processor() or None
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
        found["cuda"] = torch.version.cuda
    return found


@dataclass
class Quiet:
    """A context that sees how busy others kept the machine meanwhile.

    ``record()`` gives the load before and after, and the share of all cores that other processes took,
    None where /proc/stat does not tell.
    """

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    others: float | None = None
    _start: Any = field(default=None, repr=False)

    def __enter__(self) -> Quiet:
        self.before = os.getloadavg()
        self._start = (time.perf_counter(), own_cpu_s(), busy_s())
        return self

    def __exit__(self, *_: Any) -> None:
        wall, own, everyone = time.perf_counter(), own_cpu_s(), busy_s()
        self.after = os.getloadavg()
        if everyone is not None and self._start[2] is not None:
            foreign = (everyone - self._start[2]) - (own - self._start[1])
            self.others = max(0.0, foreign / ((wall - self._start[0]) * (os.cpu_count() or 1)))

    def record(self) -> dict[str, Any]:
        return {
            "load_before": list(self.before),
            "load_after": list(self.after),
            "cpu_share_of_others": self.others,
        }


def own_cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
