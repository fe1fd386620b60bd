"""Check that a loss gets what it needs, and name the options of `opd` that do nothing to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from opd_async.config.learning import OpdSection
from opd_async.config.losses import (
    MISMATCH_BOUNDS,
    RATIO_LOSSES,
    SAMPLED_LOSSES,
    WHOLE_RESPONSE_LOSSES,
    idle_options,
    loss_problem,
    teacher_problem,
)
from opd_async.config.schema_text import found
from opd_async.config.topology import Topology, TrainOn
from opd_async.data.model_folder import try_model
from opd_async.data.vocabulary import read_tables

OLD_FOR_RATIOS = 2
"""Steps of age from which losses on the sampled token are warned about: `python -m bench.learning --part staleness`."""


def loss_problems(topology: Topology) -> Iterator[str]:
    """List every reason why `opd.loss` could not be computed."""
    opd = topology.opd
    yield from _mismatch_problems(topology)
    if problem := loss_problem(opd.loss) or (teacher_problem(opd.loss, opd.in_learner) if opd.use_opd else None):
        yield f"opd.loss: {problem}"
    if topology.opd.loss in WHOLE_RESPONSE_LOSSES and topology.schedule.train_on is TrainOn.TOKENS:
        yield (
            f"schedule.train_on: tokens, but {topology.opd.loss} weighs a token by what follows it, so it needs whole "
            "responses; write samples"
        )
    if try_model(topology.models.student.path) is None:
        return
    vocabulary = read_tables(topology).shared
    if topology.opd.wire_topk >= vocabulary:
        yield (
            f"opd.topk: {topology.opd.topk}, but the vocabulary has {vocabulary} tokens, and some must be left "
            f"outside; write at most {vocabulary - 1}"
        )


def _mismatch_problems(topology: Topology) -> Iterator[str]:
    """List bounds of the ratio that nothing uses or that are the wrong way round, and clips that TIS replaces."""
    opd, advantage = topology.opd, topology.advantage
    if opd.mismatch == "none":
        for key in ("mismatch_low", "mismatch_high"):
            if (value := getattr(opd, key)) is not None:
                yield f"opd.{key}: {value:g}, but opd.mismatch is none; remove it, or write opd.mismatch: tis or icepop"
        return
    usual_low, usual_high = MISMATCH_BOUNDS[opd.mismatch]
    low = usual_low if opd.mismatch_low is None else opd.mismatch_low
    high = usual_high if opd.mismatch_high is None else opd.mismatch_high
    if low >= high:
        yield (
            f"opd.mismatch_low: {low:g} is not below opd.mismatch_high, {high:g} ({opd.mismatch}); write "
            f"{usual_low:g} and {usual_high:g}"
        )
    if opd.mismatch == "tis":
        for key in ("clip_low", "clip_high", "dual_clip"):
            if (value := getattr(advantage, key)) is not None:
                yield (
                    f"advantage.{key}: {value:g}, but opd.mismatch tis takes the place of the clip; write null, or "
                    "bounds into opd.mismatch_low and opd.mismatch_high"
                )


def loss_warnings(topology: Topology) -> Iterator[str]:
    """List the unwise settings of a loss, for topologies in which `loss_problems` finds nothing."""
    schedule = topology.schedule
    yield from _idle_options(topology)
    no_clip = topology.opd.clip_ratio is None and topology.opd.mismatch != "tis"  # which is another bound
    bound, oldest = schedule.max_staleness, math.inf if schedule.max_staleness is None else schedule.max_staleness
    said = "null" if bound is None else bound
    if oldest >= 1 and no_clip and topology.opd.loss in RATIO_LOSSES:
        yield (
            f"opd.clip_ratio: off with schedule.max_staleness {said}; unclipped importance ratios "
            "can make the student collapse when tokens are not of the current step; write 0.2"
        )
    if oldest >= OLD_FOR_RATIOS and topology.opd.use_opd and topology.opd.loss in SAMPLED_LOSSES:
        yield (
            f"schedule.max_staleness: {said} with opd.loss {topology.opd.loss}, whose signal is the "
            "sampled token and its importance ratio: students that move fast have collapsed at this age, and not with "
            "losses on the top-k or the whole vocabulary (docs/learning.md); write opd.loss jsd_topk, or at most "
            f"{OLD_FOR_RATIOS - 1}"
        )


def _idle_options(topology: Topology) -> Iterator[str]:
    """List the keys of `opd` that are written but do nothing to this loss; none for a saved topology with all keys."""
    opd, advantage = topology.opd, topology.advantage
    if not opd.use_opd:
        return
    ratio = advantage.estimator.facts.rewards or advantage.reference_kl_coef > 0.0
    for key in idle_options(opd.loss, ratio=ratio):
        value, usual = getattr(opd, key), OpdSection.model_fields[key].default
        if value not in (usual, None):
            yield f"opd.{key}: {found(value)} has no part in {opd.loss}; write {found(usual)}, or leave it out"
