"""The Megatron-core learner: one code path for CPU (gloo) and GPU (NCCL).

Importing any module of this package first imports megatron-core, quietly and able to run without CUDA.

Names of tensors end in the letters of their dimensions. One letter means one thing in the whole package:

    T  tokens of a micro-batch               N  sequences (responses) of a micro-batch
    P  tokens as laid out on this rank       R  trained rows of a micro-batch: response tokens
    O  those of the R rows on this rank      B  rows that an LM head runs on at a time
    V  ids of the vocabulary on this rank    X  hidden channels; Y those of the teacher
    K  ids of a top-k                        J  1 + k ids: the sampled one, then the top-k
    D  k + 1 cells: the top-k, then a tail   H  query heads, G  key heads of this rank, E  channels of a head
"""

from opd_async.learner.distributed.cpu import import_megatron

import_megatron()
