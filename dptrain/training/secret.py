"""Where the key of a run is while it runs: in its process, and in a file only if the run asks for it."""

from __future__ import annotations

from dptrain.core.entropy import Key
from dptrain.core.key_file import forget, keep, kept, key_path
from dptrain.core.ledger import Ledger
from dptrain.training.prepare import Run


def repeats(run: Run) -> bool:
    """Whether steps that are lost are repeated bit for bit: whoever has the key or the seed can."""
    return run.key.reproducible or run.config.restart == "replay"


def store(run: Run, ledger: Ledger, key: Key) -> None:
    """Keep `key`, from which the run's next steps are drawn, for as long as the run may be resumed.

    Raises:
        OSError: it cannot be written.
    """
    if repeats(run) and not key.reproducible:
        keep(key, key_path(ledger.run))


def stored(run: Run, ledger: Ledger) -> tuple[Key, str | None]:
    """The key that a resumed run goes on with, and what there is to say about it.

    Raises:
        ValueError: others may have read the key that was kept, or it is gone and cannot be done without.
        OSError: a fresh one cannot be written.
    """
    if not repeats(run) or run.key.reproducible:
        return run.key, None
    path = key_path(ledger.run)
    try:
        return kept(path), None
    except FileNotFoundError:
        if run.mechanism.is_correlated:
            raise ValueError(
                f"the run's key is not in {path}, and its noise depends on that of earlier steps: it cannot "
                "go on."
            ) from None
        store(run, ledger, run.key)
        return run.key, f"The run's key is not in {path}: lost steps are drawn afresh and paid for again."


def remove(ledger: Ledger) -> None:
    """After the last release nobody needs it."""
    forget(key_path(ledger.run))
