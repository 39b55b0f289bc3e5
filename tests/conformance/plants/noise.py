"""Faults of the noise: planted where a sum becomes a noisy mean, the one door of each engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .common import Patch, Tally, mapped, zeros_like

#: ``noisy_mean(sums, noise_stddev, L, key, ...) -> (sums + noise) / L`` of an engine
NoisyMean = Callable[..., Any]


def _door(patch: Patch, engine: str, change: Callable[[NoisyMean], NoisyMean]) -> None:
    patch.around(f"dptrain.{engine}.release", "noisy_mean", change)


def scaled_noise(factor: float) -> Callable[[Patch, str], None]:
    def plant(patch: Patch, engine: str) -> None:
        _door(patch, engine, lambda true: lambda s, stddev, *rest: true(s, factor * stddev, *rest))

    return plant


def divided_twice(patch: Patch, engine: str) -> None:
    _door(patch, engine, lambda true: lambda s, stddev, size, *rest: true(s, stddev / size, size, *rest))


def repeated(patch: Patch, engine: str) -> None:
    first: list[Any] = []

    def change(true: NoisyMean) -> NoisyMean:
        def noisy(sums: Any, stddev: float, size: float, key: Any, *rest: Any) -> Any:
            first.append(key)
            return true(sums, stddev, size, first[0], *rest)

        return noisy

    _door(patch, engine, change)


def per_physical_batch(patch: Patch, engine: str) -> None:
    tally = Tally(patch, engine)
    _door(
        patch,
        engine,
        lambda true: lambda s, stddev, *rest: true(s, stddev * max(1, tally.pieces) ** 0.5, *rest),
    )


def divided_by_the_realised_batch(patch: Patch, engine: str) -> None:
    tally = Tally(patch, engine)
    _door(
        patch,
        engine,
        lambda true: lambda s, stddev, _, *rest: true(s, stddev, max(1, tally.real or 0), *rest),
    )


def divided_by_the_data_set(patch: Patch, engine: str) -> None:
    """By ``int(q N)``, as from the length of a loader."""
    from dptrain.core.sampling import LogicalSampler

    known: list[int] = []

    def change(true: Callable) -> Callable:
        def sample(sampler: LogicalSampler, step: int) -> Any:
            known.append(max(1, int(sampler.sampling.sample_rate * sampler.dataset_size)))
            return true(sampler, step)

        return sample

    patch.around(LogicalSampler, "sample", change)
    _door(
        patch,
        engine,
        lambda true: lambda s, stddev, size, *rest: true(s, stddev, known[-1] if known else size, *rest),
    )


def on_the_mean(patch: Patch, engine: str) -> None:
    """``sum / n + N(0, (sigma C / L)^2)``, n the realised batch size."""
    tally = Tally(patch, engine)

    def change(true: NoisyMean) -> NoisyMean:
        def noisy(sums: Any, stddev: float, size: float, *rest: Any) -> Any:
            ratio = size / max(1, tally.real or 0)
            return true(mapped(engine, lambda s: s * ratio, sums), stddev, size, *rest)

        return noisy

    _door(patch, engine, change)


def in_bfloat16(patch: Patch, engine: str) -> None:
    def coarse(x: Any) -> Any:
        if engine == "torch":
            return x.bfloat16().to(x.dtype)
        import jax.numpy as jnp

        return x.astype(jnp.bfloat16).astype(x.dtype)

    def change(true: NoisyMean) -> NoisyMean:
        def noisy(sums: Any, stddev: float, size: float, key: Any, *rest: Any) -> Any:
            noise = mapped(engine, coarse, true(mapped(engine, zeros_like, sums), stddev, 1.0, key))
            return mapped(engine, lambda s, n: (s + n) / size, sums, noise)

        return noisy

    _door(patch, engine, change)


def _where_something_is(whole: bool) -> Callable[[Patch, str], None]:
    """No noise on sums that are all zero: on each of them, or if the ``whole`` is."""

    def plant(patch: Patch, engine: str) -> None:
        def change(true: NoisyMean) -> NoisyMean:
            def noisy(sums: Any, *rest: Any) -> Any:
                busy: list[bool] = []
                mapped(engine, lambda s: busy.append(bool((s != 0).any())), sums)
                keep = iter([any(busy)] * len(busy) if whole else busy)
                mean = true(sums, *rest)
                return mapped(engine, lambda m: m if next(keep) else zeros_like(m), mean)

            return noisy

        _door(patch, engine, change)

    return plant


only_where_a_gradient_is = _where_something_is(whole=False)
empty_batch_skipped = _where_something_is(whole=True)


def same_for_all_parameters(patch: Patch) -> None:
    patch.around("dptrain.core.noise", "streams_of", lambda true: lambda name: true("parameter"))


def without_the_clip_norm(patch: Patch) -> None:
    from dptrain.core.spec import StepSpec

    patch.replace(StepSpec, "noise_stddev", property(lambda spec: spec.noise_multiplier))


def constant_seed(patch: Patch) -> None:
    from dptrain.core.entropy import Key

    patch.replace(Key, "from_entropy", classmethod(lambda cls: cls(bytes(32), reproducible=False)))


def keys_by_number_alone(patch: Patch) -> None:
    """``child("noise", 3)`` and ``child("sampling").child("step", 3)`` are one key."""
    from dptrain.core.entropy import Key

    def change(true: Callable) -> Callable:
        def child(key: Key, *labels: Any) -> Key:
            numbers = [label for label in labels if not isinstance(label, str)]
            return true(key, *numbers) if numbers else key

        return child

    patch.around(Key, "child", change)


def anything_is_released(patch: Patch, engine: str) -> None:
    from dptrain.core.mechanism import Mechanism

    def unchecked(mechanism: Any, clip_norm: float) -> Any:
        return mechanism.step(0) if isinstance(mechanism, Mechanism) else mechanism

    patch.replace(f"dptrain.{engine}.release", "step_to_release", unchecked)
