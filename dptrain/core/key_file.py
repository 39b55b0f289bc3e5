"""A run's key in a file that only its owner can read, away from what a run leaves for others.

Whoever has the key can subtract the noise: a published key voids the guarantee. So it is kept only where a
run asks for it, and removed when the run has ended.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from dptrain.core import checks, durable
from dptrain.core.entropy import Key
from dptrain.core.files import parse_json

_MOST_BYTES = 4096


def key_path(run: str) -> Path:
    """Where the key of a run, by the name that its ledger gives it, is kept.

    ``$DPTRAIN_KEYS`` names the folder; else it is ``dptrain/keys`` in ``$XDG_STATE_HOME``, by default
    ``~/.local/state``.
    """
    named = os.environ.get("DPTRAIN_KEYS")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return (Path(named) if named else state / "dptrain" / "keys") / f"{run}.json"


def keep(key: Key, path: Path) -> None:
    """Write the key, readable by its owner alone; on disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = {"key": key.secret_hex(), "reproducible": key.reproducible}
    durable.write(path, json.dumps(content).encode(), mode=0o600)


def kept(path: Path) -> Key:
    """The key that `keep` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: others could read it, or it is damaged: draw a fresh one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a key ({error.strerror}): remove the file.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid != os.geteuid():
            raise ValueError(
                f"the key in {path} may be known to others: remove the file, and the run goes on with a "
                "fresh key."
            )
        content = os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
    try:
        data = checks.known_keys("a key", parse_json(content.decode()), ("key", "reproducible"))
        return Key(bytes.fromhex(data["key"]), reproducible=bool(data["reproducible"]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no key: remove the file, and the run goes on with a fresh one."
        ) from error


def forget(path: Path) -> None:
    """Remove the key, if there is one."""
    if path.exists():
        path.unlink()
