"""The decoder as a Megatron model, and micro-batches on their way through it.

Losses and files are elsewhere.
"""
