"""A model's weights in Megatron's sharded format, and what megatron-core needs to write it rightly.

The learner's whole state is saved by `learner/resume.py`.
"""
