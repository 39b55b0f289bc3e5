"""The examples run as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_existing_loop():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    script = ROOT / "examples" / "existing_loop.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"test accuracy (0\.\d+) at epsilon ([\d.]+)", done.stdout)
    assert found and float(found[1]) > 0.8 and float(found[2]) <= 8.0
