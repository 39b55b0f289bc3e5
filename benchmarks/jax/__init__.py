"""Private against non-private steps in JAX: ``python -m benchmarks.jax vit-tiny --out FILE``."""
