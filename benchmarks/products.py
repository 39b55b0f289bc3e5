"""Float32 matrix products of linear maps by MKL, which is PyTorch's choice, and by oneDNN, interleaved.

    python -m benchmarks.products --out results/cpu-products.json

For each shape: ``B`` examples of ``T`` positions, ``K`` inputs and ``N`` outputs; the forward pass, the
gradient of the input, the sum of the examples' weight gradients, and each of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.record import command, save
from dptrain.bench.environment import Quiet, environment
from dptrain.core.allocation import keep_freed_memory
from dptrain.torch import products

#: of ViT-Tiny, Small and Base and of GPT-2's blocks and head
SHAPES = [
    (16, 197, 192, 192),
    (16, 197, 192, 768),
    (8, 197, 384, 1536),
    (4, 197, 768, 3072),
    (8, 128, 768, 3072),
    (8, 128, 768, 8192),
]
ROUNDS = 21


def ways(shape: tuple[int, int, int, int]) -> dict[str, tuple[Callable, Callable]]:
    """What is done, by either library."""
    b, t, k, n = shape
    x, g, w, bias = torch.randn(b, t, k), torch.randn(b, t, n), torch.randn(n, k), torch.randn(n)
    rows, cols = g.flatten(0, 1), x.flatten(0, 1)
    total, kept = torch.zeros(n, k), torch.zeros(b, n, k)
    return {
        "forward": (lambda: F.linear(x, w, bias), lambda: products.by_onednn(x, w, bias)),
        "input gradient": (lambda: g @ w, lambda: products.by_onednn(g, w.mT)),
        "weight gradient": (
            lambda: total.addmm_(rows.mT, cols),
            lambda: total.add_(products.by_onednn(rows.mT, cols.mT)),
        ),
        "each weight gradient": (
            lambda: torch.bmm(g.mT, x, out=kept),
            lambda: [o.copy_(products.by_onednn(left.mT, right.mT)) for left, right, o in zip(g, x, kept)],
        ),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    keep_freed_memory()
    cases = []
    with Quiet() as quiet:
        for shape in SHAPES:
            b, t, k, n = shape
            for name, pair in ways(shape).items():
                raw: tuple[list[float], list[float]] = ([], [])
                for round_ in range(ROUNDS + 2):
                    for samples, run in zip(raw, pair):
                        took = seconds(run)
                        samples.extend([took] * (round_ > 1))
                mkl, onednn = map(statistics.median, raw)
                rate = 2e-9 * b * t * k * n
                cases.append(
                    {"shape": shape, "what": name, "mkl_gflops": rate / mkl, "onednn_gflops": rate / onednn}
                    | {"raw_mkl_s": raw[0], "raw_onednn_s": raw[1]}
                )
                print(f"{shape} {name}: {rate / mkl:.0f} by MKL, {rate / onednn:.0f} GFLOP/s by oneDNN")
    record = {
        "kind": "products",
        "command": command("benchmarks.products"),
        "environment": environment("cpu"),
        "quiet": quiet.record(),
        "onednn_is_chosen": products.onednn_is_faster(),
        "cases": cases,
    }
    save(record, out)


if __name__ == "__main__":
    main()
