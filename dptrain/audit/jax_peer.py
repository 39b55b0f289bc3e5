"""JAX libraries, by the adapters of measurements: sampling is ours, clipping and noise are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import optax

from dptrain.audit.jax_subject import device, weights
from dptrain.audit.subjects import Problem, Training, Weights
from dptrain.bench.peers import Peer
from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, physical_batches


class Library:
    """A library in one of its modes."""

    def __init__(self, peer: Peer, mode: str):
        self.peer, self.mode, self.name = peer, mode, f"{peer.name} {mode}"

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        mechanism, key = how.mechanism, Key.from_entropy()
        task = SimpleNamespace(
            params=jax.device_put(dict(problem.jax_params()), device(how.device)),
            loss=problem.jax_loss,
            clip_norm=mechanism.clip_norm,
            logical_batch_size=round(mechanism.expected_batch_size),
            optimizer=optax.sgd(how.learning_rate),
            noise_key=jax.random.key(key.child("jax").seed64() % 2**63),
        )
        training = self.peer.training(task, self.mode, mechanism.noise_multiplier)
        yield weights(training.params)
        for step in range(mechanism.steps):
            sampler = LogicalSampler(problem.size, mechanism.step(step).sampling, key.child("sampling"))
            for piece in physical_batches(sampler.sample(step), how.physical_batch_size):
                batch = problem.inputs(piece.indices), problem.targets(piece.indices)
                training.accumulate(batch, piece.mask)
            training.release()
            yield weights(training.params)

    def for_many_trainings(self) -> Library:
        return self
