"""Damaged and hostile inputs for everything that dptrain reads or is called with.

``python -m benchmarks.fuzz --inputs 1000000 --processes 2``
"""
