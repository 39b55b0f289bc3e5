"""Private training in JAX on all devices there are, of one host or of several.

    python examples/jax_many_devices.py
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/jax_many_devices.py   # four on one CPU
    srun --ntasks-per-node=1 python examples/jax_many_devices.py --hosts                      # SLURM

Parameters lie in shards. scikit-learn's digits, which every host can read; each reads its own devices' rows.
"""

import sys

import jax

if "--hosts" in sys.argv:  # before anything else: JAX finds out from SLURM who takes part
    jax.distributed.initialize(heartbeat_timeout_seconds=30)

import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from sklearn.datasets import load_digits

import dptrain
import dptrain.jax as dpj

digits = load_digits()
images = (digits.data / 8 - 1).astype(np.float32)  # [N, 64]
labels = digits.target.astype(np.int32)
first, second = jax.random.split(jax.random.key(0))
params = {
    "w1": 0.1 * jax.random.normal(first, (64, 128)),
    "b1": jnp.zeros(128),
    "w2": 0.1 * jax.random.normal(second, (128, 10)),
    "b2": jnp.zeros(10),
}


def apply(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, example):
    image, label = example
    return -jax.nn.log_softmax(apply(params, image))[label]


mechanism = dptrain.Mechanism.calibrate(
    epsilon=8, delta=1e-4, sample_rate=0.3, steps=80, clip_norm=1.0, expected_batch_size=420
)
private = dpj.make_private(
    loss_fn,
    params,
    optax.sgd(0.5, momentum=0.9),
    (images[:1400], labels[:1400]),
    mechanism,
    physical_batch_size=64,  # of each device
    mesh=jax.make_mesh((jax.device_count(),), ("devices",)),
    shard_params=True,
)
says = jax.process_index() == 0
for step in private.steps():
    if says and step.number % 20 == 0:
        print(f"step {step.number} of {step.steps}, epsilon {step.epsilon:.2f}")

whole = multihost_utils.process_allgather(private.params, tiled=True)  # all take part
accuracy = (apply(whole, images[1400:]).argmax(1) == labels[1400:]).mean()
if says:
    print(f"{jax.device_count()} devices of {jax.process_count()} processes")
    print(f"test accuracy {accuracy:.3f} at epsilon {private.epsilon:.2f}, delta {mechanism.delta:g}")
