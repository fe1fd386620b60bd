"""Compute the loss of a micro-batch from its rows, as the configuration names it.

    what the loss needs of the teacher, by `LOSSES`     where its function is
    nothing: it looks at the sampled token              learner.losses.sampled, by name in `SAMPLED`
    its top-k                                           learner.losses.divergences
    the whole vocabulary                                learner.losses.full_divergences
    with `ratio` beside one of the last two             a divergence, and returns on the sampled token

The estimator's advantage, and the pull towards a reference model, are a policy gradient beside any of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_async.config.losses import LOSSES
from opd_async.learner.config import LossConfig
from opd_async.learner.errors import LearnerError
from opd_async.learner.losses.divergences import DIVERGENCES, Cells, long_returns
from opd_async.learner.losses.full_divergences import RowDivergences
from opd_async.learner.losses.logprobs import RowLogprobs
from opd_async.learner.losses.sampled import (
    LossOutput,
    Rows,
    policy_gradient,
    ratio,
    reverse_kl,
    reverse_kl_behaviour,
    sft,
    summed,
    weighted,
)
from opd_async.learner.model.layout import PackedBatch

FORKS = 5
"""One token in so many is a fork."""
SAMPLED = {"reverse_kl": reverse_kl, "reverse_kl_behaviour": reverse_kl_behaviour, "sft": sft}


def support_of(packed: PackedBatch, config: LossConfig) -> tuple[Tensor | None, bool]:
    """The ids int64[R, k] whose logprobs the loss needs beside the sampled token's, and whether it needs the tail.

    Raises `LearnerError` when the loss needs the teacher's top-k and the batch has none.
    """
    if config.loss in SAMPLED:
        return None, False
    if packed.topk_ids_RK is not None:
        return packed.topk_ids_RK, LOSSES[config.loss].tail
    if len(packed.targets_R):
        raise LearnerError(f"the loss {config.loss} needs the teacher's top-k, and the batch has none")
    return packed.targets_R[:, None], LOSSES[config.loss].tail  # no row, hence no id


def objective(packed: PackedBatch, logprobs: RowLogprobs, config: LossConfig) -> LossOutput:
    """The configured loss of a micro-batch, summed over its rows. `logprobs` are those that `support_of` asks for."""
    rows = _rows(packed, logprobs.sampled_R, packed.teacher_R, config)
    if config.loss in SAMPLED:
        output = SAMPLED[config.loss](rows, config)
        if rows.teacher_R is not None:
            output = replace(output, sums=output.sums | style(rows, rows.teacher_R - rows.logprobs_R.detach()))
    else:
        assert logprobs.support_RK is not None
        teacher_RK = packed.topk_logprobs_RK if packed.topk_logprobs_RK is not None else logprobs.support_RK.detach()
        cells = Cells(logprobs.support_RK, logprobs.tail_R, teacher_RK)
        output = with_divergence(rows, _later_signals(rows, packed, config), cells, config)
    return _plus_entropy(_with_others(output, packed, logprobs), logprobs.entropy_R, packed, config)


def full_objective(packed: PackedBatch, found: RowDivergences, config: LossConfig) -> LossOutput:
    """As `objective`, for the losses on the whole vocabulary; what `packed` says of the teacher is not looked at."""
    rows = _rows(packed, found.sampled_R, found.teacher_R, config)
    output = policy_gradient(rows, _later_signals(rows, packed, config), config)
    bounded_R, more = bounded(found.divergence_R, config)
    output = output.plus(config.kl_coef * weighted(bounded_R, packed.weights_R).sum(), **more, **style(rows, bounded_R))
    if LOSSES[config.loss].student_kl:
        output = replace(output, sums=output.sums | {"reverse_kl": summed(found.divergence_R.detach())})
    return _plus_entropy(_with_others(output, packed, found), found.entropy_R, packed, config)


def bounded(divergence_R: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """min(D, divergence_clip) at each row, and what to report of it: a row beyond the bound has no gradient.

    Source: slime's `--opsd-jsd-clip`, which bounds a token's divergence, summed over the vocabulary. (The code of the
    paper on self-distillation, 2601.18734, bounds each term of the sum.)
    """
    if config.divergence_clip is None:
        return divergence_R, {}
    beyond_R = (divergence_R.detach() > config.divergence_clip).float()
    return divergence_R.clamp(max=config.divergence_clip), {"divergence_clipped": summed(beyond_R)}


def style(rows: Rows, signal_R: Tensor) -> dict[str, Tensor]:
    """What to report of how much of a signal is on the most frequent tokens, where that was asked for.

    float64[2]: the sum of |signal| on these tokens, and on all.
    """
    if rows.frequent_R is None:
        return {}
    size_R = signal_R.detach().abs().double()
    return {"frequent_signal": torch.stack([size_R.where(rows.frequent_R, 0.0).sum(), size_R.sum()])}


def _rows(packed: PackedBatch, sampled_R: Tensor, teacher_R: Tensor | None, config: LossConfig) -> Rows:
    """The micro-batch's rows, with the logprobs float32[R] that student and teacher give to the sampled tokens."""
    return Rows(
        logprobs_R=sampled_R,
        behaviour_R=packed.behaviour_R,
        teacher_R=teacher_R,
        advantages_R=_advantages(packed, sampled_R, config),
        staleness_R=packed.staleness_R,
        sequence_R=packed.sequence_R,
        weights_R=packed.weights_R,
        frequent_R=packed.frequent_R,
    )


def _later_signals(rows: Rows, packed: PackedBatch, config: LossConfig) -> Tensor:
    """The signal on the sampled token beside a divergence, float32[R]: MiniLLM's returns, else nothing."""
    if LOSSES[config.loss].whole:
        return long_returns(rows.signal_R(rows.logprobs_R), packed.sequence_R)
    return torch.zeros_like(rows.behaviour_R)


def with_divergence(rows: Rows, signal_R: Tensor, cells: Cells, config: LossConfig) -> LossOutput:
    """kl_coef * divergence, plus the clipped policy gradient of the estimator's advantage and kl_coef * `signal_R`.

    The importance ratio acts on advantage and signal; the divergence depends on the prefix only. `signal_clamp` bounds
    the signal alone: clamping terms of a divergence can turn its sign.
    """
    divergence_R, more = bounded(DIVERGENCES[config.loss](cells, config), config)
    return policy_gradient(rows, signal_R, config).plus(
        config.kl_coef * weighted(divergence_R, rows.weights_R).sum(),
        **more,
        **style(rows, divergence_R),
        student_support=summed(cells.student_RK.detach().exp().sum(-1)),
        teacher_support=summed(cells.teacher_RK.exp().sum(-1)),
    )


def _plus_entropy(output: LossOutput, entropy_R: Tensor | None, packed: PackedBatch, config: LossConfig) -> LossOutput:
    """The loss minus entropy_coef times the student's entropy, summed over rows, where there is such a bonus; and what
    to report of the entropy, where it is known.

    Its gradient is exact at each prefix (a sum over the vocabulary); prefixes are those of the weights that sampled.
    """
    if entropy_R is None:
        return output
    seen = {"entropy": summed(entropy_R), **forks(entropy_R.detach(), packed.frequent_R is not None)}
    if not config.entropy_coef:
        return replace(output, sums=output.sums | seen)
    return output.plus(-config.entropy_coef * weighted(entropy_R, packed.weights_R).sum(), **seen)


def forks(entropy_R: Tensor, asked: bool) -> dict[str, Tensor]:
    """What to report of the entropy where the student is least sure, where that was asked for: at the fifth of the rows
    that has the highest (at least one).

    float64[2]: the sum over them, and how many they are. Source: the tokens at which a response forks are that
    minority (2506.01939).
    """
    if not asked or not len(entropy_R):
        return {}
    count = max(1, len(entropy_R) // FORKS)
    highest = entropy_R.topk(count).values.double().sum()
    return {"fork_entropy": torch.stack([highest, torch.full_like(highest, count)])}


def _advantages(packed: PackedBatch, sampled_R: Tensor, config: LossConfig) -> Tensor:
    """The estimator's advantages plus reference_kl_coef * (log p_ref - sg(log p)), float32[R].

    The latter is the reverse KL to the reference as a policy gradient, which the ratio corrects off-policy like the
    teacher's: unclipped, exactly the gradient of KL(p || p_ref) at each prefix. exp(d) - d - 1 as a loss, as GRPO has
    it, has the gradient of the forward KL.
    """
    if packed.reference_R is None:
        return packed.advantages_R
    return packed.advantages_R + config.reference_kl_coef * (packed.reference_R - sampled_R.detach())


def _with_others(output: LossOutput, packed: PackedBatch, found: RowLogprobs | RowDivergences) -> LossOutput:
    """The same output with what is reported of other models, where there are some: the KL to the reference, and to the
    teacher behind the student's prompts; and the contrast, log q - log q_contrast of the tokens as they were sampled.

    As that to the teacher, each KL estimates the present student's own: rho (log p - log p_other), rho = p / mu.
    """
    others = {"reference_kl": packed.reference_R, "plain_kl": packed.plain_R}
    sampled_R, sums = found.sampled_R.detach(), dict(output.sums)
    for name, other_R in others.items():
        if other_R is not None:
            sums[name] = summed(ratio(sampled_R, packed.behaviour_R) * (sampled_R - other_R))
    if packed.teacher_R is not None and packed.contrast_R is not None:
        sums["contrast"] = summed(packed.teacher_R - packed.contrast_R)
    return replace(output, sums=sums)
