"""An unfinished run, as its folder holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dptrain.core import durable
from dptrain.core.key_file import forget, key_path
from dptrain.core.ledger import Ledger, LedgerError
from dptrain.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, read
from dptrain.training.config import ConfigError, TrainConfig
from dptrain.training.facts import Facts
from dptrain.training.run_folder import CONFIG, RunFolder

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """What a run goes on from.

    Attributes:
        ledger: locked for this process.
        fixed: frozen parameters and buffers, by name.
        notes: what whoever resumes the run should know.
    """

    folder: RunFolder
    config: TrainConfig
    ledger: Ledger
    checkpoint: Checkpoint
    facts: Facts
    fixed: Tensors
    notes: tuple[str, ...]


def open_saved(path: Path) -> Saved | None:
    """The run in this folder; None if it died before its first checkpoint, hence before any release.

    Raises:
        ConfigError: there is no run, or it is finished.
        CheckpointError, LedgerError: its files are damaged, or do not belong together.
    """
    folder = RunFolder(path)
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} holds no run: it has no {CONFIG}.")
    if folder.is_finished:
        _tidy(folder)
        raise ConfigError(f"the run in {path} is finished: there is nothing to resume.")
    config = folder.config
    checkpoint, refused = Checkpoints(folder.checkpoints).newest()
    if checkpoint is None and not refused and not _has_released(folder):
        return None
    if checkpoint is None:
        missing = f"{folder.checkpoints} holds no checkpoint"
        raise CheckpointError(f"{' '.join(refused) or missing}: the run in {path} cannot go on.")
    facts = Facts.from_dict(checkpoint.facts)
    ledger = Ledger.open(folder.ledger)
    try:
        ledger.check_continues(facts.ledger)
        fixed, belongs = read(folder.fixed)
        if belongs != {"run": ledger.run}:
            raise CheckpointError(f"{folder.fixed} is of another run: put the one of this run back.")
    except BaseException:
        ledger.close()
        raise
    notes = [f"{note} The one before it is used." for note in refused]
    return Saved(folder, config, ledger, checkpoint, facts, fixed, tuple(notes))


def _tidy(folder: RunFolder) -> None:
    """Remove what a finished run had no time to remove."""
    if folder.checkpoints.exists():
        forget(key_path(Ledger.read(folder.ledger).run))
        Checkpoints(folder.checkpoints).remove()
    durable.remove_unfinished(folder.path)


def clear_unstarted(folder: RunFolder) -> None:
    """Remove what a run has left that died before its first release.

    Raises:
        LedgerError: there are releases on record; they are never forgotten.
    """
    if _has_released(folder):
        raise LedgerError(
            f"{folder.ledger} holds releases, which a new run would hide: choose another --out."
        )
    folder.ledger.unlink(missing_ok=True)
    durable.remove_unfinished(folder.path)
    Checkpoints(folder.checkpoints).remove()


def _has_released(folder: RunFolder) -> bool:
    """Whether the ledger has more than its first line, or is missing where a run has left results."""
    if not folder.ledger.exists():
        if folder.weights.exists() or folder.metrics_bytes():
            raise LedgerError(
                f"{folder.path} holds results of a run without its ledger: choose another --out."
            )
        return False
    return folder.ledger.read_bytes().count(b"\n") > 1


def fixed_tensors(model: nn.Module) -> Tensors:
    """All that `model` saves but its trained parameters, under whatever names."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if id(value) not in trained}


@torch.no_grad()
def restore_fixed(model: nn.Module, saved: Tensors) -> None:
    """Put back what `fixed_tensors` took from a model of the same making.

    Raises:
        CheckpointError: it is of another one.
    """
    own = fixed_tensors(model)
    if {n: (t.shape, t.dtype) for n, t in own.items()} != {n: (t.shape, t.dtype) for n, t in saved.items()}:
        raise CheckpointError(
            "the frozen weights of the checkpoint are of another model: resume with the settings and the "
            "versions that it was made with."
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
