"""One training run, from configuration to run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dptrain.torch.ranks import ALONE, Ranks
from dptrain.training.config import ConfigError, TrainConfig
from dptrain.training.device import matmul_precision
from dptrain.training.follower import introduce
from dptrain.training.identity import check_same_run, check_same_settings
from dptrain.training.listener import Listener, Silent
from dptrain.training.outcome import Outcome
from dptrain.training.prepare import prepare
from dptrain.training.run_folder import RunFolder
from dptrain.training.saved import Saved, open_saved
from dptrain.training.session import Session


def train(config: TrainConfig, listener: Listener | None = None, ranks: Ranks = ALONE) -> Outcome:
    """Train as `config` says and leave everything in the run folder.

    Of several ranks, the first calls this, and the others `follower.follow`.

    Interrupted (Ctrl-C), it stops between two statements, accounts for every step that may have
    been released, and leaves weights, metrics, the epsilon spent so far and a checkpoint to `resume`
    from. Raises a ValueError of one sentence, before any budget is spent, for what cannot be done.
    """
    return _train(config, RunFolder.plan(config), None, listener or Silent(), ranks)


def resume(
    path: Path, config: TrainConfig | None = None, listener: Listener | None = None, ranks: Ranks = ALONE
) -> Outcome:
    """Go on with the unfinished run in a folder.

    Steps that were lost since its last checkpoint are repeated: bit for bit where the run has a seed or its
    key was kept, else with fresh randomness; these are paid for again, and the run ends earlier. There may be
    more or fewer ranks than before; sums then round differently, and steps that were lost are paid for again.

    config: the run's own, with other settings of the machine (`config.MACHINE_SETTINGS`) if need be.

    Raises a ValueError of one sentence for what cannot be done: the run is finished, being written to, or
    damaged; the mechanism, the data set or the model is not what it was.
    """
    saved = open_saved(path)
    own = RunFolder(path).config if saved is None else saved.config
    config = replace(config or own, out=path)
    try:
        check_same_settings(own, config)
        return _train(config, RunFolder(path), saved, listener or Silent(), ranks)
    finally:
        if saved is not None:
            saved.ledger.close()


def _train(
    config: TrainConfig, folder: RunFolder, saved: Saved | None, listener: Listener, ranks: Ranks
) -> Outcome:
    if config.engine != "torch" and not ranks.alone:
        raise ConfigError(
            f"--engine {config.engine} takes all its devices in one process: start dptrain without torchrun."
        )
    run = prepare(config, saved and saved.fixed)
    if saved is not None:
        check_same_run(saved.facts.identity, run)
        # Another size would round differently.
        run = replace(run, config=replace(run.config, physical_batch_size=saved.facts.physical_batch_size))
    introduce(run, saved and folder.fixed, ranks)
    listener.prepared(run, folder)
    with matmul_precision(run.config.precision):
        return Session(run, folder, saved, listener, ranks).run_to_end()
