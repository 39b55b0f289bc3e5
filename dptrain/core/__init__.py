"""The mechanism: what is released, with which noise, and what it costs in privacy.

Nothing here knows of PyTorch or JAX. The engines read these descriptions and carry
them out; the accountant reads the same descriptions and says what they cost.
"""
