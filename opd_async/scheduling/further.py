"""Samples that an episode has begun beside the one of its lease: further conversations, other choices, forks. Pure.

    lease of sample n -> episode -> FurtherWanted -> LeaseBook.further -> FurtherLease: a sample of its own

They are numbered one after the other over the whole run, in a range of their own, so that leased samples stay those of
prompts and groups, and what is trained of either is a few intervals. A further sample belongs to the group of its
episode, begins whatever admission says, and is never leased again: what is held when its actor dies is its end.
"""

from __future__ import annotations

FURTHER_IDS = 1 << 52
"""Further samples are numbered from here, far above the samples of leases and of evaluations; JSON keeps them exact."""
MAX_FURTHER = 63
"""Further samples of one attempt of an episode."""


def is_further(sample_id: int) -> bool:
    """Whether a sample was begun by an episode beside that of its lease."""
    return sample_id >= FURTHER_IDS
