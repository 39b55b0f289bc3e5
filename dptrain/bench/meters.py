"""Memory of this process: its peak, and a limit."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Protocol

import torch

from dptrain.bench.contestant import Unsupported
from dptrain.torch.device_memory import total_memory

#: mallopt(3): every larger block gets pages of its own, which go back when it is freed, and all threads share
#: one arena. So resident memory is what is alive; left to itself glibc keeps some of what was freed.
OWN_PAGES = {"M_TRIM_THRESHOLD": (-1, 2**18), "M_MMAP_THRESHOLD": (-3, 2**18), "M_ARENA_MAX": (-8, 1)}


class Meter(Protocol):
    """Bytes, above what there was when the meter was made."""

    def reset(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int:
        """The largest since then."""
        ...


def meter(device: str) -> Meter:
    """Of a device's allocator, or of the process for a CPU.

    Raises:
        Unsupported: the system does not tell.
    """
    if device.startswith("cuda"):
        return _Allocator(device)
    if not sys.platform.startswith("linux"):
        raise Unsupported("peak memory of a process is read from /proc: measure memory on Linux.")
    return _Resident()


class _Resident:
    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        for name, value in OWN_PAGES.values():
            libc.mallopt(name, value)
        self._trim = libc.malloc_trim
        self._empty = 0
        self.reset()
        self._empty = self.peak()

    def reset(self) -> None:
        gc.collect()
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes what is resident now

    def peak(self) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x.split()[1] for x in status if x.startswith("VmHWM"))) - self._empty


class _Allocator:
    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._empty = torch.cuda.memory_allocated(self._device)

    def reset(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._empty


def limit(device: str, limit_bytes: int) -> None:
    """Make this much memory all there is: of a GPU's, or by which the address space may still grow.

    What a GPU's driver takes comes on top, as it does on a card of that size.
    """
    if device.startswith("cuda"):
        whole = total_memory(torch.device(device))
        if limit_bytes > whole:
            raise Unsupported(f"{device} has {whole / 2**30:.1f} GiB: less than the limit is.")
        torch.cuda.set_per_process_memory_fraction(limit_bytes / whole, torch.device(device))
        return
    import resource  # not on Windows

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit_bytes,) * 2)
