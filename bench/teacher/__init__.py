"""Streamed against whole-sample scoring on a real engine.

`python -m bench.teacher`.
"""
