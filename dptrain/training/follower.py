"""A rank other than the first: it takes its share of every step, and leaves files and words to rank 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dptrain.core.entropy import Key
from dptrain.core.releases import NotTheSame, Releases
from dptrain.core.remembered import recalling
from dptrain.core.shared_releases import SharedReleases
from dptrain.core.team import RankLost
from dptrain.torch.ranks import Ranks
from dptrain.training.checkpoint import read
from dptrain.training.config import TrainConfig
from dptrain.training.device import matmul_precision
from dptrain.training.learner import TorchLearner
from dptrain.training.prepare import Run, prepare


def introduce(run: Run, fixed: Path | None, ranks: Ranks) -> None:
    """Rank 0 says what the run is. fixed: the frozen weights of a run that goes on."""
    key = [run.key.secret_hex(), run.key.reproducible]
    ranks.tell({"config": run.config.to_dict(), "key": key, "fixed": fixed and str(fixed.resolve())})


def follow(ranks: Ranks) -> None:
    """Be a rank of the run that rank 0 leads, until it ends.

    Raises:
        RankLost: rank 0 failed, or another rank.
        ValueError: in one sentence, what cannot be done here.
    """
    said = ranks.tell()
    secret, reproducible = said["key"]
    key = Key(bytes.fromhex(secret), reproducible=reproducible)
    fixed = read(Path(said["fixed"]))[0] if said["fixed"] else None
    run = prepare(TrainConfig.from_dict(said["config"]), fixed, key)
    try:
        with matmul_precision(run.config.precision):
            _take_part(run, ranks)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"Rank {ranks.rank} was interrupted.") from interruption


def _unknown() -> Releases:
    raise RankLost("only rank 0 has the record.")


def _take_part(run: Run, ranks: Ranks) -> None:
    plan = ranks.tell()  # by the same measurements as rank 0
    run = replace(run, config=replace(run.config, physical_batch_size=plan["size"]))
    learner = TorchLearner(run)
    with recalling(plan["measured"]):
        learner.get_ready(lambda: None)
        learner.join(ranks)
        releases = SharedReleases(_unknown, ranks)
        while releases.may_go_on(learner.taken):
            try:
                for step in learner.steps(releases.key, releases.before):
                    if learner.shares_out and ranks.tell():
                        learner.gather()
                    if not releases.may_go_on(step.number):
                        break
            except NotTheSame:
                releases.draw_afresh()
