"""Numerical kernels: arrays in, arrays out. They know NumPy and Numba, nothing else.

One file per family; `reference` holds the slow, obvious twin of every fast kernel.
"""
