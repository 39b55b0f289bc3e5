"""What this machine can do: products, and bytes of memory, a second. Best of several tries each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dptrain.core.entropy import Key
from dptrain.torch.noise import noisy_mean

TRIES = 5
#: bytes that no cache holds, and bytes that one does
LARGE, SMALL = 512 * 2**20, 2**20


@dataclass(frozen=True)
class Rates:
    """Of one device, as measured.

    Attributes:
        flops_per_s: of a large float32 matrix product, an addition and a multiplication counted as two.
        read, write, copy: bytes a second of memory; a copy counts both. ``write_fresh`` is into memory
            that was just allocated, page faults included; ``read_cached`` is again and again of 1 MiB.
        noise_per_s: Gaussian numbers drawn and added, as dptrain does it.
    """

    flops_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    write_fresh_bytes_per_s: float
    copy_bytes_per_s: float
    read_cached_bytes_per_s: float
    noise_per_s: float

    record = property(dataclasses.asdict)


def measure_rates(device: str = "cpu", side: int = 2048, large: int = LARGE) -> Rates:
    """A few seconds of work."""

    def best(run: Callable[[], object], tries: int = TRIES) -> float:
        run()
        return min(seconds(run, device) for _ in range(tries))

    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    products = [best(lambda x=x: torch.mm(x, b)) / x.shape[0] for x in (a, a[: side // 2])]
    source, target = (torch.zeros(large // 4, device=device) for _ in range(2))
    cached = torch.zeros(SMALL // 4, device=device)
    sums = {"w": torch.zeros(4 * 2**20, device=device)}
    key = Key.from_entropy()

    def again() -> None:
        for _ in range(64):
            torch.sum(cached)

    return Rates(
        flops_per_s=2 * side * side / min(products),
        read_bytes_per_s=large / best(lambda: torch.sum(source)),
        write_bytes_per_s=large / best(lambda: target.fill_(1.0)),
        write_fresh_bytes_per_s=large / best(lambda: torch.empty_like(source).fill_(1.0)),
        copy_bytes_per_s=2 * large / best(lambda: target.copy_(source)),
        read_cached_bytes_per_s=64 * SMALL / best(again),
        noise_per_s=4 * 2**20 / best(lambda: noisy_mean(sums, 1.0, 1.0, key, out=sums)),
    )


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started
