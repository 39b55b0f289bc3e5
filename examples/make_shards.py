"""Write a data set as shards, a part at a time, for `dptrain train --data shards:FOLDER` to read by index.

Here scikit-learn's digits; any source will do that yields arrays: no more than one shard is in memory.

    python examples/make_shards.py FOLDER
    dptrain train --data shards:FOLDER
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

EXAMPLES_PER_SHARD = 300  # of real images 10,000 or so: files of a few hundred MB


def parts(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images uint8 [n, C, H, W], labels [n]) of one shard after another."""
    digits = load_digits()
    images = np.clip(digits.images * 16, 0, 255).astype(np.uint8)[:, np.newaxis]
    chosen = np.flatnonzero((np.arange(len(images)) % 5 == 0) == (split == "test"))
    for start in range(0, len(chosen), EXAMPLES_PER_SHARD):
        rows = chosen[start : start + EXAMPLES_PER_SHARD]
        yield images[rows], digits.target[rows]


folder = Path(sys.argv[1])
for split in ("train", "test"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, (images, labels) in enumerate(parts(split)):
        path = folder / split / f"{number:05}.safetensors"
        # Stated, the number of classes need not be found out by reading all labels.
        save_file({"images": images, "labels": labels}, path, metadata={"num_classes": "10"})
        print(f"{path}: {len(images)} examples")
