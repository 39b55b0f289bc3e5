"""One private training loop, four libraries for models: Flax NNX, Flax Linen, Haiku, Equinox.

    python examples/jax_models.py nnx

All that dptrain sees is a loss of one example and a tree of parameters. scikit-learn's digits.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import dptrain
import dptrain.jax as dpj

digits = load_digits()
images = (digits.images / 8 - 1).astype(np.float32)[..., None]  # [N, 8, 8, 1]
labels = digits.target.astype(np.int32)


def with_nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
            self.norm = nnx.GroupNorm(32, num_groups=4, rngs=rngs)
            self.head = nnx.Linear(512, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.gelu(self.norm(self.conv(x))), (2, 2), (2, 2))
            return self.head(x.reshape(-1))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def with_linen():
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.gelu(linen.GroupNorm(4)(linen.Conv(32, (3, 3))(x)))
            return linen.Dense(10)(linen.max_pool(x, (2, 2), (2, 2)).reshape(-1))

    net = Net()
    return net.init(jax.random.key(0), images[0]), net.apply


def with_haiku():
    import haiku as hk

    def forward(x):
        x = jax.nn.gelu(hk.GroupNorm(4)(hk.Conv2D(32, 3)(x[None])))
        return hk.Linear(10)(hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").reshape(-1))

    net = hk.without_apply_rng(hk.transform(forward))
    return net.init(jax.random.key(0), images[0]), net.apply


def with_equinox():
    import equinox as eqx

    conv, head = jax.random.split(jax.random.key(0))
    net = eqx.nn.Sequential([
        eqx.nn.Lambda(lambda x: x.transpose(2, 0, 1)),
        eqx.nn.Conv2d(1, 32, 3, padding=1, key=conv),
        eqx.nn.GroupNorm(4, 32),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(512, 10, key=head),
    ])  # fmt: skip
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    return params, lambda params, x: eqx.combine(params, rest)(x)


MODELS = {"nnx": with_nnx, "linen": with_linen, "haiku": with_haiku, "equinox": with_equinox}
params, apply = MODELS[sys.argv[1] if len(sys.argv) > 1 else "nnx"]()


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
    physical_batch_size=64,
)
for step in private.steps():
    if step.number % 20 == 0:
        print(f"step {step.number} of {step.steps}, epsilon {step.epsilon:.2f}")

predicted = jax.vmap(lambda x: apply(private.params, x).argmax())(images[1400:])
accuracy = (predicted == labels[1400:]).mean()
print(f"test accuracy {accuracy:.3f} at epsilon {private.epsilon:.2f}, delta {mechanism.delta:g}")
