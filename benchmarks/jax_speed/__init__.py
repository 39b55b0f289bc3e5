"""Private against non-private steps in JAX: ``python -m benchmarks.jax_speed vit-tiny --out FILE``."""
