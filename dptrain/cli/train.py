"""`dptrain train`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import tyro

from dptrain.cli.display import RunDisplay, show_outcome
from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.core.allocation import keep_freed_memory
from dptrain.recipes import RECIPES, recipe
from dptrain.report import draw_curves
from dptrain.torch.ranks import Ranks
from dptrain.training import ConfigError, RunFolder, TrainConfig, read_config, resume, train
from dptrain.training.config import ALTERNATIVES
from dptrain.training.follower import follow
from dptrain.training.interruption import termination_as_interruption
from dptrain.training.ranks import joined
from dptrain.training.run_folder import CURVES, METRICS

__all__ = ["BAD_INPUT_ERRORS", "run"]

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Train as the flags say, over a recipe, a configuration file or a saved run, over the defaults."""
    keep_freed_memory()
    with termination_as_interruption(), joined() as ranks:
        if ranks.leads:
            return _lead(arguments, ranks)
        follow(ranks)
    return 0


def _lead(arguments: Sequence[str], ranks: Ranks) -> int:
    """What the only process does, or the first of several."""
    config, saved = parse(arguments), resumed(arguments)
    console = Terminal()
    with RunDisplay(console, config) as display:
        outcome = train(config, display, ranks) if saved is None else resume(saved, config, display, ranks)
    folder = outcome.folder.path
    draw_curves(folder / METRICS, folder / CURVES)
    show_outcome(console, outcome)
    return INTERRUPTED if outcome.interrupted else 0


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the flags describe. Exits with code 2 on flags that don't parse."""
    sources, flags = _split_off_sources(arguments)
    given = [name for name in ("config", "recipe", "resume") if getattr(sources, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"Give either --{given[0]} or --{given[1]}, not both.")
    base = TrainConfig()
    if sources.config is not None:
        base = read_config(sources.config)
    if sources.recipe is not None:
        base = recipe(sources.recipe)
    if sources.resume is not None:
        base = RunFolder(sources.resume).config
    return tyro.cli(
        TrainConfig,
        prog="dptrain train",
        description=(
            "Train a model with differential privacy. Every setting below may also come from "
            f"--config FILE (.json or .toml) or --recipe NAME ({', '.join(RECIPES)}); flags go "
            "before both. --resume RUN goes on with an unfinished run; only flags about the machine go "
            "with it."
        ),
        args=flags,
        default=base.without_rivals_of(_given(flags)),
    )


def resumed(arguments: Sequence[str]) -> Path | None:
    """The run that is to go on, if one is."""
    return _split_off_sources(arguments)[0].resume


def _split_off_sources(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The values of --config, --recipe and --resume, and all other arguments."""
    parser = ArgumentParser(prog="dptrain train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--resume", type=Path)
    return parser.parse_known_args(list(arguments))


def _given(arguments: Sequence[str]) -> set[str]:
    """Which settings of `ALTERNATIVES` the flags state."""
    stated = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"
    }
    return stated.intersection(name for pair in ALTERNATIVES for name in pair)
