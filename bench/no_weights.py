"""What learners without a model save in a checkpoint: empty files in the place of weights."""

from __future__ import annotations

from pathlib import Path

from opd_async.run import checkpoints


def save_no_weights(checkpoint: Path) -> dict[str, float]:
    """Write what a checkpoint's seal asks for of a learner, and return what such a learner says of it; nothing can be
    resumed from it."""
    shards = checkpoint / checkpoints.SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    for name in (checkpoints.METADATA, "__0_0.distcp"):
        (shards / name).write_bytes(b"")
    return checkpoints.Shards(1, 0).stats()
