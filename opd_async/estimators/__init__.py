"""Arithmetic on rewards, values and top-k lists, in numpy.

No torch, no sockets, no state: each function is a formula with its source.
"""
