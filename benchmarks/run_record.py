"""Turn a finished run folder into an immutable record under ``results/``.

python benchmarks/run_record.py RUN results/mnist-convnet.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def main(run: Path, out: Path, note: str | None = None) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [m for m in metrics if m["event"] == "evaluation"]
    config = json.loads((run / "config.json").read_text())
    for place in ("data_dir", "weights", "out"):  # where things lay is nobody's business
        config[place] = None if config.get(place) is None else Path(config[place]).name
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    record = {
        "kind": "training run",
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "note": note,
        "config": config,
        "summary": json.loads((run / "summary.json").read_text()),
        "final": evaluations[-1],
        "evaluations": evaluations,
        "other_events": [m for m in metrics if m["event"] not in ("evaluation", "unprotected")],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
