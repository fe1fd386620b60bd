"""torch.distributed and Megatron's process groups, with or without CUDA.

Nothing here knows a model.
"""
