"""The Megatron-core learner: one code path for CPU (gloo) and GPU (NCCL).

Importing any module of this package first imports megatron-core, quietly and able to run without CUDA.
"""

from opd_async.learner.distributed.cpu import import_megatron

import_megatron()
