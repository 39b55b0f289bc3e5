"""`dptrain train`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import tyro

from dptrain.cli.display import RunDisplay, show_outcome
from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.recipes import RECIPES, recipe
from dptrain.report import draw_curves
from dptrain.training import ConfigError, TrainConfig, read_config, train
from dptrain.training.config import ALTERNATIVES
from dptrain.training.run_folder import CURVES, METRICS

__all__ = ["BAD_INPUT_ERRORS", "run"]

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Train as the flags say, over a recipe or a configuration file, over the defaults."""
    config = parse(arguments)
    console = Terminal()
    with RunDisplay(console, config) as display:
        outcome = train(config, display)
    folder = outcome.folder.path
    draw_curves(folder / METRICS, folder / CURVES)
    show_outcome(console, outcome)
    return INTERRUPTED if outcome.interrupted else 0


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the flags describe. Exits with code 2 on flags that don't parse."""
    config_file, recipe_name, flags = _split_off_sources(arguments)
    if config_file is not None and recipe_name is not None:
        raise ConfigError("Give either --config or --recipe, not both.")
    base = TrainConfig()
    if config_file is not None:
        base = read_config(config_file)
    if recipe_name is not None:
        base = recipe(recipe_name)
    return tyro.cli(
        TrainConfig,
        prog="dptrain train",
        description=(
            "Train a model with differential privacy. Every setting below may also come from "
            f"--config FILE (.json or .toml) or --recipe NAME ({', '.join(RECIPES)}); flags go "
            "before both."
        ),
        args=flags,
        default=base.without_rivals_of(_given(flags)),
    )


def _split_off_sources(arguments: Sequence[str]) -> tuple[Path | None, str | None, list[str]]:
    """The values of --config and --recipe, and all other arguments."""
    parser = ArgumentParser(prog="dptrain train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe")
    known, flags = parser.parse_known_args(list(arguments))
    return known.config, known.recipe, flags


def _given(arguments: Sequence[str]) -> set[str]:
    """Which settings of `ALTERNATIVES` the flags state."""
    stated = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"
    }
    return stated.intersection(name for pair in ALTERNATIVES for name in pair)
