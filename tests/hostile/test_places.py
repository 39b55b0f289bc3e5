"""`dptrain train` writes into its run folder and its cache of measurements, whatever names it meets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
WATCHED = """
import json, os, sys
written, started = set(), []
def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes)) and (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.utime"):
        written.add(os.path.abspath(os.fsdecode(args[0]))) if isinstance(args[0], (str, bytes)) else None
    elif event in ("os.rename", "os.link", "os.symlink"):
        written.update(os.path.abspath(os.fsdecode(path)) for path in args[:2])
    elif event in ("socket.connect", "os.system", "os.exec"):
        started.append(f"{event} {args[:2]}")
sys.addaudithook(hook)
from dptrain.cli import main
code = main(sys.argv[2:])
found = sorted(written)
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "written": found}, file)
"""
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07",
    "[bold]x[/nothing]",
    "a\nb\rc",
    "-rf",
    "\u202egnp",
    "..%2f..",
    "{x}",
    "é",
)


def images(root: Path) -> Path:
    """A folder of images whose classes bear hostile names."""
    for split in ("train", "test"):
        for number, label in enumerate(HOSTILE):
            folder = root / split / label
            folder.mkdir(parents=True)
            for copy in range(4):
                Image.new("RGB", (8, 8), (20 * number, 30 * copy, 0)).save(folder / f"[red]{copy}\x1b[2J.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """(where it all lies, what was written, what was printed) of one run among hostile names."""
    base = tmp_path_factory.mktemp("places")
    here = base / "here"
    here.mkdir()
    (base / "temporary").mkdir()
    data = images(base / "[link=x]images[bold] ..")
    arguments = ["train", "--data", str(data), "--model", "linear", "--image-size", "8", "--workers", "0"]
    arguments += [
        "--logical-batch-size",
        "8",
        "--physical-batch-size",
        "8",
        "--steps",
        "2",
        "--evaluations",
        "1",
    ]
    arguments += [
        "--noise-multiplier",
        "1",
        "--clip-norm",
        "1",
        "--out",
        "../runs/[x] a/../b [bold]",
        "--seed",
        "1",
    ]
    environment = os.environ | {
        "HOME": str(base / "home"),
        "DPTRAIN_CACHE": str(base / "cache"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": str(base / "matplotlib"),
        "TMPDIR": str(base / "temporary"),
        "TORCHINDUCTOR_CACHE_DIR": str(base / "temporary" / "inductor"),
    }
    environment.pop("DPTRAIN_DATA", None)
    told = base / "told.json"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(told), *arguments],
        cwd=here,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    said = (done.stdout + done.stderr).decode()
    assert told.is_file(), said
    return base, json.loads(told.read_text()), said


def test_nothing_is_written_elsewhere(run):
    base, found, said = run
    assert found["code"] == 0, said
    ours = [base / name for name in ("runs", "cache")]
    allowed = [*ours, base / "matplotlib", base / "temporary", Path("/dev/null"), Path("/dev/tty")]
    outside = [path for path in found["written"] if not any(Path(path).is_relative_to(a) for a in allowed)]
    assert outside == []
    assert (base / "runs/b [bold]/model.safetensors").is_file()
    assert os.listdir(base / "here") == []
    assert not [path for path in (base / "temporary").rglob("*") if path.is_file()]
    assert not (base / "home").exists()


def test_the_folder_that_is_left_is_the_run_folder(run):
    base, _, _ = run
    assert [path.name for path in (base / "runs").iterdir() if any(path.iterdir())] == ["b [bold]"]


def test_names_do_not_move_the_terminal(run):
    _, _, said = run
    assert not {c for c in said if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c == "\u202e"}
    assert "[link=x]images[bold] .." in " ".join(said.split())
