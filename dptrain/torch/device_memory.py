"""How much memory a device has, and whether it has run out."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def total_memory(device: torch.device) -> int:
    """Bytes of the device: of a CPU, of the machine or of the control group that we run in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: accelerators have an exception for it, a CPU's allocator a sentence."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))
