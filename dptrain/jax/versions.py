"""All that depends on the version of JAX: names of primitives, and how an equation is run.

Written against 0.10 to 0.12. ``jax.extend.core`` is what JAX offers for work on jaxprs; whatever is
not offered there, and could change with a release, is used in this file alone.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

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
    "calls_back",
    "draws_together",
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


def draws_together(closed: ClosedJaxpr) -> bool:
    """Whether random numbers are drawn by keys of the kind rbg anywhere: under ``vmap``, JAX draws those of
    all rows by the key of the first."""

    def is_rbg(atom: Any) -> bool:
        dtype = getattr(atom.aval, "dtype", None)
        known = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        return known and "rbg" in str(dtype)

    def look(jaxpr: Jaxpr) -> bool:
        return any(
            eqn.primitive.name == "rng_bit_generator"
            or any(map(is_rbg, (*eqn.invars, *eqn.outvars)))
            or any(map(look, jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )

    return look(closed.jaxpr)


def calls_back(closed: ClosedJaxpr) -> bool:
    """Whether the host is called on the way, to print, say."""

    def look(jaxpr: Jaxpr) -> bool:
        return any(
            "callback" in eqn.primitive.name or any(map(look, jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )

    return bool(closed.effects) or look(closed.jaxpr)
