"""Hugging Face folders: their files, their names for Megatron's parameters, loading and writing.

Reads and writes one tensor at a time.
"""
