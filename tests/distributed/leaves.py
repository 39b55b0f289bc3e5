"""One rank of a run, which leaves without a word in a method of its optimizer: ``leaves.py METHOD ...``."""

from __future__ import annotations

import os
import sys

from torch.distributed.optim import ZeroRedundancyOptimizer

from dptrain.cli import main

if __name__ == "__main__":
    place, *arguments = sys.argv[1:]
    if place:
        setattr(ZeroRedundancyOptimizer, place, lambda *_, **__: os._exit(1))
    sys.exit(main(arguments))
