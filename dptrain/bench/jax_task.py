"""What every contestant of JAX is given: the loss of one example, parameters and one physical batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.models import ModelError, build

#: JAX's names for what may be done to float32 products
PRODUCTS = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "default"}


@dataclass(frozen=True)
class JaxTask:
    """A case as JAX sees it: the model, weights and data are those that PyTorch is given."""

    case: Case
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
            raise Unsupported("JAX is not installed: pip install 'dptrain[jax]'.")

    @cached_property
    def device(self) -> Any:
        """JAX's device.

        Raises:
            Unsupported: there is none of that name.
        """
        import jax

        kind, _, number = self.case.device.partition(":")
        try:
            return jax.devices("gpu" if kind == "cuda" else kind)[int(number or 0)]
        except (RuntimeError, IndexError) as error:
            raise Unsupported(f"JAX has no device {self.case.device!r} here.") from error

    @cached_property
    def _made(self) -> tuple[Any, dict[str, Any], tuple[Any, Any]]:
        import jax
        import numpy as np
        import torch

        from dptrain.models.jax import translated

        case = self.case
        torch.manual_seed(0)
        shape = (3, case.image_size, case.image_size)
        model = build(case.model, case.num_classes, shape)
        try:
            forward = translated(model, case.model, case.num_classes, shape)
        except ModelError as error:
            raise Unsupported(str(error)) from error
        params = {
            name: jax.device_put(p.detach().numpy(), self.device) for name, p in model.named_parameters()
        }
        drawn = np.random.default_rng(1)
        images = drawn.standard_normal((case.batch_size, *shape), np.float32)
        labels = drawn.integers(case.num_classes, size=case.batch_size).astype(np.int32)
        batch = jax.device_put(images, self.device), jax.device_put(labels, self.device)
        return forward, params, batch

    def clipped_at(self, clip_norm: float) -> JaxTask:
        """The same task, with what it has made and compiled, at another clip norm."""
        task = replace(self)
        task.__dict__.update(self.__dict__ | {"clip_norm": clip_norm})
        return task

    @cached_property
    def gradient(self) -> Callable[[Any, Any], Any]:
        """``(params, example) -> gradient``, compiled."""
        import jax

        with jax.default_matmul_precision(PRODUCTS[self.case.precision]):
            return jax.jit(jax.grad(self.loss)).lower(self.params, next(self.examples())).compile()

    def examples(self) -> Iterator[Any]:
        """Those of the batch, one by one."""
        images, labels = self.batch
        return ((images[b], labels[b]) for b in range(self.case.batch_size))

    @property
    def params(self) -> dict[str, Any]:
        """By timm's names."""
        return self._made[1]

    @property
    def batch(self) -> tuple[Any, Any]:
        """``(images [B, 3, S, S], labels [B])``."""
        return self._made[2]

    def loss(self, params: Any, example: tuple[Any, Any]) -> Any:
        """Cross entropy of one example, in float32."""
        import jax
        import jax.numpy as jnp

        image, label = example
        if self.case.precision == "bf16":
            params, image = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, image))
        return -jax.nn.log_softmax(self._made[0](params, image).astype(jnp.float32))[label]

    @property
    def logical_batch_size(self) -> int:
        """L, of so many full physical batches."""
        return self.case.batch_size * self.case.accumulate
