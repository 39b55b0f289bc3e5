"""A zoo of tiny public models, and what each library for private training makes of them.

``python -m benchmarks.zoo`` compares clipped gradients with those of single examples.
"""
