"""The oracle compares in float64, which JAX must be told to allow; tests compile much and run little; and a
CPU stands for four devices."""

import os

FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_TO_COMPILE} {FOUR_DEVICES}".strip()

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
