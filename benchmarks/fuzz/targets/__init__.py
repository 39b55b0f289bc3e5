"""Everything that is fuzzed: a line for each reader in the files of this package."""

from __future__ import annotations

from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets import (
    arguments,
    arguments_jax,
    arrays,
    command_line,
    images,
    records,
    runs,
    settings,
    shards,
    weights,
)

TARGETS: dict[str, Target] = {
    target.name: target
    for part in (
        images,
        arrays,
        shards,
        weights,
        settings,
        runs,
        records,
        command_line,
        arguments,
        arguments_jax,
    )
    for target in part.TARGETS
}
