"""Checks before a start: each finding names a key of the topology, what was found, and what to write.

A check only reads: it starts no role and leaves no file behind.
"""
