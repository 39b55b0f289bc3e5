"""All that depends on the version of JAX: names of primitives, and how an equation is run.

Written against 0.10 to 0.12. ``jax.extend.core`` is what JAX offers for work on jaxprs; whatever is
not offered there, and could change with a release, is used in this file alone.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

__all__ = [
    "CALLS",
    "LOOP",
    "RECOMPUTED",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "abstract",
    "bind",
    "keys_like",
    "loop_parts",
]

#: calls that are written out in place, and the parameter that holds the callee
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
#: ``jax.checkpoint``, under its names
RECOMPUTED = {"checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
LOOP = "scan"


def abstract(x: Any) -> Any:
    """The abstract value of an array: shape and type."""
    return jax.typeof(x)


def loop_parts(params: dict) -> tuple[int, int]:
    """The numbers of constants and of carries of a ``scan``, which come first among its inputs."""
    if "num_consts" in params:  # until 0.11
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = params["ft_in"].unpack()
    return len(constants), len(carries)


def keys_like(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Some keys of random numbers, of this shape and kind."""
    with jax.ensure_compile_time_eval():
        one = jax.random.key(0, impl=str(shape.dtype._impl.name))  # type: ignore[attr-defined]
        return jax.random.split(one, shape.shape)


def bind(eqn: JaxprEqn, values: list, params: dict | None = None) -> list:
    """The outputs of one equation, with its own parameters or others."""
    params = eqn.params if params is None else params
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]
