"""Files that are either whole or not there, whatever happens to the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
"""How a file that is being written ends; whoever finds one may remove it."""


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new file beside ``path`` to write to, which takes its place once it is on disk.

    Whoever opens ``path`` at any time sees the old content or all of the new. If the block fails, the old
    content stays and the new file is removed.

    Args:
        mode: permissions, from which the process's umask is taken.

    Raises:
        OSError: it could not be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
        yield scratch
        flush(scratch)
        scratch.replace(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Put ``content`` in place of what ``path`` holds; on disk when this returns."""
    with replacing(path, mode) as scratch:
        scratch.write_bytes(content)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died were writing to ``folder``."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)
