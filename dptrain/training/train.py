"""One training run, from configuration to run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dptrain.training.config import TrainConfig
from dptrain.training.device import matmul_precision
from dptrain.training.identity import check_same_run, check_same_settings
from dptrain.training.listener import Listener, Silent
from dptrain.training.outcome import Outcome
from dptrain.training.prepare import prepare
from dptrain.training.run_folder import RunFolder
from dptrain.training.saved import Saved, open_saved
from dptrain.training.session import Session


def train(config: TrainConfig, listener: Listener | None = None) -> Outcome:
    """Train as `config` says and leave everything in the run folder.

    Interrupted (Ctrl-C), it stops between two statements, accounts for every step that may have
    been released, and leaves weights, metrics, the epsilon spent so far and a checkpoint to `resume`
    from. Raises a ValueError of one sentence, before any budget is spent, for what cannot be done.
    """
    return _train(config, RunFolder.plan(config), None, listener or Silent())


def resume(path: Path, config: TrainConfig | None = None, listener: Listener | None = None) -> Outcome:
    """Go on with the unfinished run in a folder.

    Steps that were lost since its last checkpoint are repeated: bit for bit where the run has a seed or its
    key was kept, else with fresh randomness; these are paid for again, and the run ends earlier.

    config: the run's own, with other settings of the machine (`config.MACHINE_SETTINGS`) if need be.

    Raises a ValueError of one sentence for what cannot be done: the run is finished, being written to, or
    damaged; the mechanism, the data set or the model is not what it was.
    """
    saved = open_saved(path)
    own = RunFolder(path).config if saved is None else saved.config
    config = replace(config or own, out=path)
    try:
        check_same_settings(own, config)
        return _train(config, RunFolder(path), saved, listener or Silent())
    finally:
        if saved is not None:
            saved.ledger.close()


def _train(config: TrainConfig, folder: RunFolder, saved: Saved | None, listener: Listener) -> Outcome:
    run = prepare(config, saved)
    if saved is not None:
        check_same_run(saved.facts.identity, run)
        # Another size would round differently.
        run = replace(run, config=replace(run.config, physical_batch_size=saved.facts.physical_batch_size))
    listener.prepared(run, folder)
    with matmul_precision(run.config.precision):
        return Session(run, folder, saved, listener).run_to_end()
