"""What is wrong with a configuration by itself, in one sentence, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dptrain.core import methods
from dptrain.core.checks import shown
from dptrain.core.printable import is_printable
from dptrain.training.config import ALTERNATIVES, KNOWN_BEFORE, LEAKY, ConfigError, TrainConfig


def check(config: TrainConfig) -> None:
    """Refuse what no data set or model could make sense of."""
    for name, hint in get_type_hints(TrainConfig, include_extras=True).items():
        if not _fits(getattr(config, name), hint):
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be {shown(getattr(config, name))}; "
                "see `dptrain train --help` for what it takes."
            )
        if not _is_sound(getattr(config, name)):
            raise ConfigError(
                f"--{name.replace('_', '-')} is {shown(getattr(config, name))}: give a finite number, or a "
                "text without control characters."
            )
    for first, second in ALTERNATIVES:
        given = [name for name in (first, second) if getattr(config, name) is not None]
        if len(given) != 1:
            flags = f"--{first.replace('_', '-')} or --{second.replace('_', '-')}"
            raise ConfigError(f"Give exactly one of {flags} ({'both' if given else 'neither'} given).")
    positive = (
        "epsilon",
        "delta",
        "clip_norm",
        "logical_batch_size",
        "max_logical_batch_size",
        "epochs",
        "steps",
        "lr",
        "adam_floor",
        "image_size",
        "max_length",
        "lora_rank",
        "subspace_rank",
        "keep",
        "lora_alpha",
        "evaluations",
        "checkpoint_every",
        "devices",
        "noise_ramp",
        "noise_bands",
        "clip_ramp",
        "batch_ramp",
    )
    for name in positive:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give a positive number.")
    if config.noise_multiplier is not None and config.noise_multiplier <= 0:
        raise ConfigError(
            f"--noise-multiplier is {config.noise_multiplier}: give a positive number, or --method "
            "non-private."
        )
    if config.delta >= 1:
        raise ConfigError(
            f"--delta is {config.delta}: give a number well below 1 / (number of training examples)."
        )
    most = config.max_logical_batch_size
    if most is not None and most < config.logical_batch_size:
        raise ConfigError(
            f"--max-logical-batch-size is {most}, below the {config.logical_batch_size:g} examples that are "
            "expected: give six standard deviations more, L + 6 sqrt(L), and it costs no privacy."
        )
    if most is not None and config.accountant == "rdp":
        raise ConfigError("--max-logical-batch-size is accounted by --accountant pld alone; leave rdp out.")
    if config.augmentations < 0:
        raise ConfigError(
            f"--augmentations is {config.augmentations}: give a number of views, or 0 for none."
        )
    if not 0 < config.clip_quantile < 1:
        raise ConfigError(f"--clip-quantile is {config.clip_quantile}: give a number between 0 and 1.")
    if config.hardened and (config.clip_rule != "flat" or config.clip_ramp != 1):
        raise ConfigError("--hardened clips gradients as a whole, to one norm: leave out the other rule.")
    if config.noise_bands > 1:
        _check_correlated(config)
    if config.clip_rule == "quantile":
        for other, given in (
            ("--compile", config.compile),
            ("--clip-ramp", config.clip_ramp != 1),
        ):
            if given:
                raise ConfigError(
                    f"--clip-rule quantile moves the clip norm at every step: leave out {other}."
                )
    if config.physical_batch_size != "auto" and config.physical_batch_size < 1:
        raise ConfigError(
            f"--physical-batch-size is {config.physical_batch_size}: give a positive number or auto."
        )
    if not 0 <= config.validation_fraction < 1:
        raise ConfigError(
            f"--validation-fraction is {config.validation_fraction}: give a number from 0 to below 1."
        )
    if not 0 <= config.weight_average < 1:
        raise ConfigError(f"--weight-average is {config.weight_average}: give a number from 0 to below 1.")
    if not 0 <= config.denoise < 1:
        raise ConfigError(f"--denoise is {config.denoise}: give a number from 0, for none, to below 1.")
    if config.denoise and config.shard != "none":
        raise ConfigError("--denoise keeps its filter whole on each rank: leave --shard out.")
    if config.frozen_blocks < 0:
        raise ConfigError(f"--frozen-blocks is {config.frozen_blocks}: give 0, for none, or more.")
    if config.frozen_blocks and config.engine == "jax":
        raise ConfigError("--frozen-blocks is for --engine torch: leave it out, or choose --trainable head.")
    if config.frozen_blocks and config.trainable == "head":
        raise ConfigError("--trainable head leaves all blocks as they are: leave out --frozen-blocks.")
    if config.cache_features and config.trainable != "head" and not config.frozen_blocks:
        raise ConfigError(
            "--cache-features needs --trainable head or --frozen-blocks: only what is frozen has fixed "
            "features."
        )
    if config.engine == "jax" and config.compile:
        raise ConfigError(
            "--compile is for --engine torch; the JAX engine compiles every step: leave it out."
        )
    if config.engine != "jax" and config.devices > 1:
        raise ConfigError("--devices is for --engine jax: with PyTorch, torchrun starts a process for each.")
    if config.hardened and (config.engine == "jax" or config.compile or config.method == "non-private"):
        other = "--engine jax" if config.engine == "jax" else "--compile" if config.compile else "non-private"
        raise ConfigError(f"--hardened is for private, uncompiled steps of --engine torch, not for {other}.")
    if config.engine == "jax" and config.shard != "none":
        raise ConfigError("--shard is for --engine torch under torchrun: leave it out.")
    _check_compression(config)
    if config.seed is not None and config.seed < 0:
        raise ConfigError(
            f"--seed is {config.seed}: give a number of at least 0, or leave it out for secure randomness."
        )


def _check_correlated(config: TrainConfig) -> None:
    """What noise that is correlated over steps does not go with."""
    others = {
        "--hardened": config.hardened,
        "--clip-rule quantile": config.clip_rule == "quantile",
        "--max-logical-batch-size": config.max_logical_batch_size is not None,
        "--denoise": config.denoise > 0,
        f"--optimizer {config.optimizer}": config.optimizer in ("adam-bc", "adamw-bc"),
        "the ramps": {config.noise_ramp, config.clip_ramp, config.batch_ramp} != {1.0},
    }
    for other, given in others.items():
        if given:
            raise ConfigError(
                f"--noise-bands {config.noise_bands} does not go with {other}: leave one of them out."
            )
    if config.seed is None and config.restart != "replay" and config.method != "non-private":
        raise ConfigError(
            "--noise-bands needs --restart replay: noise that depends on that of earlier steps can only be "
            "repeated, from a key in a file outside the run folder."
        )


def _check_compression(config: TrainConfig) -> None:
    """Refuse what cannot be compressed as asked."""
    how = config.compress
    if config.keep > 1:
        raise ConfigError(f"--keep is {config.keep}: give the share of coordinates to keep, at most 1.")
    if config.public_examples < 0:
        raise ConfigError(f"--public-examples is {config.public_examples}: give a number of at least 0.")
    if how.startswith("public-") and not config.public_examples:
        raise ConfigError(
            f"--compress {how} needs public examples: say with --public-examples 600 how many of the "
            "training set are public."
        )
    if config.compress_before_clipping and how not in KNOWN_BEFORE:
        raise ConfigError(
            "--compress-before-clipping needs a --compress that no private example decides "
            f"({', '.join(KNOWN_BEFORE)}), not {how}."
        )
    if config.error_feedback and (how in ("none", LEAKY) or config.compress_before_clipping):
        other = "--compress-before-clipping" if config.compress_before_clipping else f"--compress {how}"
        raise ConfigError(f"--error-feedback is for what is left out after the noise, and not for {other}.")
    if config.engine == "jax" and how != "none":
        raise ConfigError("--compress is for --engine torch: leave one of them out.")
    if how != "none" and config.optimizer in ("adam-bc", "adamw-bc"):
        raise ConfigError(
            f"--optimizer {config.optimizer} subtracts the noise of all coordinates, of which --compress "
            "leaves a part: take adam or adamw."
        )
    if how != "none" and config.denoise:
        raise ConfigError(
            "--denoise filters the noise of all coordinates, of which --compress leaves a part: "
            "leave one of them out."
        )
    if how == LEAKY and config.noise_bands > 1:
        raise ConfigError(f"--compress {how} has no noise to correlate: leave out --noise-bands.")
    if how == LEAKY and config.clip_rule == "quantile":
        raise ConfigError(
            f"--compress {how} has no noise to follow a quantile with: choose another --clip-rule."
        )
    if how == LEAKY and (config.hardened or not methods.resolve(config.method).is_private):
        other = "--hardened" if config.hardened else f"--method {config.method}"
        raise ConfigError(f"--compress {how} shows what noise does not protect, and cannot go with {other}.")


def _is_sound(value: Any) -> bool:
    """Whether a number can be reckoned with, and a text or a path be printed and given to the system."""
    if isinstance(value, int | float):
        return abs(value) < 2**63 and math.isfinite(value)
    return not isinstance(value, str | Path) or is_printable(str(value))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, perhaps from a file, is of the type that the setting has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
