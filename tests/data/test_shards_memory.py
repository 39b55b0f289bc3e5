"""What a sharded source takes in memory follows the batches, not the source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.shard_files import png, write

pytest.importorskip("pyarrow")
if sys.platform != "linux":
    pytest.skip("the peak of resident memory is read where Linux tells it", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("safetensors", "arrow", "parquet")
SHARDS, ROWS, SIDE = 10, 200, 184
STREAMED = """
import sys, torch
from dptrain.data import Preprocess, load

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def stream(part):
    return sum(len(labels) for _, labels in part.stream(torch.arange(len(part)).split(8)))

torch.set_num_threads(1)
sources = []
for path in sys.argv[1:]:
    size = None if path.endswith("safetensors") else 8
    sources.append(load(f"shards:{path}", preprocess=Preprocess(size), workers=2).train)
for source in sources:
    stream(source.subset(torch.arange(80)))
before = peak_mb()
assert [stream(source) for source in sources] == [2000] * 3
print(peak_mb() - before)
"""


def source(folder: Path, form: str) -> int:
    """2,000 examples of 100 kB; the number of bytes of their files."""
    for number in range(SHARDS):
        path = folder / f"train/{number}.{form}"
        if form == "safetensors":
            rows = np.full((ROWS, SIDE, SIDE, 3), number, dtype=np.uint8)
        else:  # decoders stop where the image ends
            rows = [png(np.full((8, 8, 3), number, dtype=np.uint8)).ljust(3 * SIDE**2, b"\0")] * ROWS
        write(path, rows, [row % 3 for row in range(ROWS)])
    return sum(file.stat().st_size for file in folder.rglob("*.*"))


def test_peak_memory_does_not_grow_with_the_source(tmp_path):
    sizes = {form: source(tmp_path / form, form) for form in FORMATS}
    assert min(sizes["safetensors"], sizes["arrow"]) > 200e6
    command = [sys.executable, "-c", STREAMED, *(str(tmp_path / form) for form in FORMATS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50
