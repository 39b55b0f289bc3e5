"""What may stand where a file is expected."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

KINDS = ("file",) * 60 + (
    "absent",
    "folder",
    "link-to-nothing",
    "link-to-itself",
    "link",
    "fifo",
    "zero",
    "empty",
    "sparse",
    "huge",
)
HUGE_BYTES = {"sparse": 1 << 31, "huge": 1 << 42}


def kind(chance: random.Random) -> str:
    """Mostly a file."""
    return chance.choice(KINDS)


def put(path: Path, content: bytes, kind: str = "file") -> None:
    """Make `path` of a kind: a file of this content, a folder, a link, a pipe that nobody writes to, ...

    sparse and huge: 2 GiB and 4 TiB of zeros after the content, which take no room.
    """
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "absent":
            pass
        case "folder":
            path.mkdir()
        case "link-to-nothing":
            path.symlink_to("nowhere")
        case "link-to-itself":
            path.symlink_to(path.name)
        case "link":
            target = path.with_name("elsewhere" + path.suffix)
            target.write_bytes(content)
            path.symlink_to(target.name)
        case "fifo":
            os.mkfifo(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "empty":
            path.write_bytes(b"")
        case "sparse" | "huge":
            path.write_bytes(content)
            os.truncate(path, HUGE_BYTES[kind])
        case _:
            path.write_bytes(content)


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
