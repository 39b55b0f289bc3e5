"""The oracle compares in float64, which JAX must be told to allow; and tests compile much and run little."""

import os

FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_TO_COMPILE}".strip()

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
