"""The losses that `opd.loss` offers, and those that it refuses because they do not estimate what they claim."""

from __future__ import annotations

SAMPLED_LOSSES = frozenset({"reverse_kl", "reverse_kl_behaviour"})
"""Those on the sampled token alone: one number per token from the teacher."""
GIVEN_LOSSES = frozenset({"sft"})
"""Those on tokens that somebody else wrote; on the student's own they would teach nothing."""
TOPK_LOSSES = frozenset({"forward_kl_topk", "reverse_kl_topk", "jsd_topk", "minillm_topk"})
"""Those that need the teacher's top-k on the wire."""
FULL_LOSSES = frozenset({"forward_kl_full", "reverse_kl_full", "jsd_full", "minillm_full"})
"""Those on the whole vocabulary, exact: the teacher must be in the learner's ranks."""
RATIO_LOSSES = frozenset({"reverse_kl", "reverse_kl_behaviour", "minillm_topk", "minillm_full"})
"""Those with a signal on the sampled token, and so an importance ratio."""
WHOLE_RESPONSE_LOSSES = frozenset({"minillm_topk", "minillm_full"})
"""Those whose signal on a token depends on what follows it."""

LOSSES = (
    "reverse_kl",
    "reverse_kl_behaviour",
    "forward_kl_topk",
    "reverse_kl_topk",
    "jsd_topk",
    "minillm_topk",
    "forward_kl_full",
    "reverse_kl_full",
    "jsd_full",
    "minillm_full",
    "sft",
)

REFUSED = {
    "k1": (
        "as a loss, log p - log q of the student's own tokens has zero expected gradient: nothing but noise is learnt",
        "reverse_kl",
    ),
    "k3": (
        "as a loss, exp(d) - d - 1 of the student's own tokens has the expected gradient p - q: that of the forward KL "
        "with the variance of sampling, not that of the reverse KL which it estimates",
        "forward_kl_topk or reverse_kl",
    ),
    "reverse_kl_no_ratio": (
        "without the importance ratio it is biased as soon as tokens are one step old, and the student collapses; at "
        "max_staleness 0 the ratio is 1 and reverse_kl the same thing",
        "reverse_kl",
    ),
    "reverse_kl_topk_naive": (
        "sum_S p log(p / q) has a gradient at p = q: it drains the teacher's top-k of probability",
        "reverse_kl_topk",
    ),
    "reverse_kl_topk_scalar": (
        "a sum over the top-k times log p of the sampled token has zero expected gradient, since the sum does not "
        "depend on that token",
        "reverse_kl_topk",
    ),
    "forward_kl_topk_raw": (
        "sum_S q log(q / p) has a gradient at p = q: without the tail it sharpens the student into the teacher's top-k",
        "forward_kl_topk",
    ),
}
"""Name: the reason, and what to write instead."""


def loss_problem(name: str) -> str | None:
    """Why `opd.loss` cannot be `name`, and what to write; None if it can."""
    if name in LOSSES:
        return None
    if name in REFUSED:
        reason, instead = REFUSED[name]
        return f"{name} is refused: {reason}; write {instead}"
    return f"unknown loss {name!r}; write one of {', '.join(LOSSES)}"


def teacher_problem(name: str, in_learner: bool) -> str | None:
    """Why the loss `name` does not go with where the teacher is, and what to write; None if it does.

    `in_learner`: the teacher is a model in the learner's ranks, not an engine.
    """
    if name in FULL_LOSSES and not in_learner:
        instead = name.replace("_full", "_topk")
        return (
            f"{name} needs the teacher's whole distribution, and an engine gives its top-k at most; write {instead}, "
            "or opd.type megatron"
        )
    if name in TOPK_LOSSES and in_learner:
        instead = name.replace("_topk", "_full")
        return f"{name} is for a teacher behind an engine; this one gives its whole distribution: write {instead}"
    return None
