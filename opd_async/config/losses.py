"""The losses that `opd.loss` offers, in one table, and those that it refuses because they estimate something else.

    python -m opd_async.config.losses        print the rows of the table in docs/learning.md

Schema, checks, learner and documentation read `LOSSES`. A loss is a row here and a function in `learner/losses/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Needs(StrEnum):
    """What a loss needs of the teacher, beside its logprob of the sampled token."""

    NOTHING = "nothing"
    TOPK = "topk"
    """The teacher's top-k, which engines send."""
    FULL = "full"
    """The whole distribution, which only a teacher in the learner's ranks has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFacts:
    """What the rest of the program has to know of a loss, and what the documentation says of it."""

    needs: Needs
    options: tuple[str, ...] = ()
    """Keys of the section `opd` that act on it, beside `kl_coef` and those of a ratio (`RATIO_OPTIONS`)."""
    ratio: bool = False
    """Whether there is a signal on the sampled token, and so an importance ratio."""
    whole: bool = False
    """Whether the signal on a token depends on what follows it, so that it needs whole responses."""
    given: bool = False
    """Whether it is for responses from a data set alone: on the student's own its expected gradient is zero."""
    student_kl: bool = False
    """Whether its divergence is KL(p || q) over the whole vocabulary: then reported in place of an estimate."""
    tail: bool = False
    """Whether it compares the probability outside the top-k too."""
    twin: str | None = None
    """The same loss for a teacher at the other place (engine or learner); None where there is none."""
    formula: str
    """Per token, as docs/learning.md has it; so are the next two."""
    looks_at: str
    wire: str = "nothing"


RATIO_OPTIONS = ("signal_clamp", "clip_ratio", "mismatch")
"""Keys of the section `opd` that act on a signal on the sampled token."""
TOPK_BYTES = "8 k bytes per token"
NO_BYTES = "nothing at all"

LOSSES: dict[str, LossFacts] = {
    "reverse_kl": LossFacts(
        needs=Needs.NOTHING,
        ratio=True,
        formula="-min(rho A, clip(rho) A), A = sg(log q(y) - log p(y)), rho = p(y) / mu(y)",
        looks_at="*y*",
    ),
    "reverse_kl_behaviour": LossFacts(
        needs=Needs.NOTHING,
        ratio=True,
        formula="the same with A = log q(y) - log mu(y)",
        looks_at="*y*",
    ),
    "forward_kl_topk": LossFacts(
        needs=Needs.TOPK,
        options=("topk", "divergence_clip"),
        tail=True,
        twin="forward_kl_full",
        formula="sum_S q log(q / p) + (1 - Q_S) log((1 - Q_S) / (1 - P_S))",
        looks_at="*S*, tail",
        wire=TOPK_BYTES,
    ),
    "reverse_kl_topk": LossFacts(
        needs=Needs.TOPK,
        options=("topk", "divergence_clip"),
        twin="reverse_kl_full",
        formula="sum_S (p log(p / q) - p + q)",
        looks_at="*S*",
        wire=TOPK_BYTES,
    ),
    "jsd_topk": LossFacts(
        needs=Needs.TOPK,
        options=("topk", "jsd_beta", "divergence_clip"),
        tail=True,
        twin="jsd_full",
        formula="beta KL(q ‖ m) + (1 - beta) KL(p ‖ m) over *S* and tail, m = beta q + (1 - beta) p",
        looks_at="*S*, tail",
        wire=TOPK_BYTES,
    ),
    "minillm_topk": LossFacts(
        needs=Needs.TOPK,
        options=("topk",),
        ratio=True,
        whole=True,
        tail=True,
        twin="minillm_full",
        formula="sum_S p log(p / q) + tail term, and -rho clip(...) sg(mean of later log q - log p) on *y*",
        looks_at="*S*, tail, *y*",
        wire=TOPK_BYTES,
    ),
    "forward_kl_full": LossFacts(
        needs=Needs.FULL,
        options=("divergence_clip",),
        twin="forward_kl_topk",
        formula="sum_v q log(q / p) over the whole vocabulary",
        looks_at="every *v*",
        wire=f"{NO_BYTES}: the teacher is in the learner",
    ),
    "reverse_kl_full": LossFacts(
        needs=Needs.FULL,
        options=("divergence_clip",),
        student_kl=True,
        twin="reverse_kl_topk",
        formula="sum_v p log(p / q)",
        looks_at="every *v*",
        wire=NO_BYTES,
    ),
    "jsd_full": LossFacts(
        needs=Needs.FULL,
        options=("jsd_beta", "divergence_clip"),
        twin="jsd_topk",
        formula="beta KL(q ‖ m) + (1 - beta) KL(p ‖ m)",
        looks_at="every *v*",
        wire=NO_BYTES,
    ),
    "minillm_full": LossFacts(
        needs=Needs.FULL,
        ratio=True,
        whole=True,
        student_kl=True,
        twin="minillm_topk",
        formula="sum_v p log(p / q), and -rho clip(...) sg(mean of later log q - log p) on *y*",
        looks_at="every *v*, *y*",
        wire=NO_BYTES,
    ),
    "sft": LossFacts(
        needs=Needs.NOTHING,
        given=True,
        formula="-log p(y), *y* from a data set",
        looks_at="*y*",
    ),
}
DEFAULT_LOSS = "reverse_kl"

Mismatch = Literal["none", "tis", "icepop"]
MISMATCH_BOUNDS: dict[Mismatch, tuple[float, float]] = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0)}
"""`opd.mismatch`: the bounds on p / mu where `opd.mismatch_low` and `opd.mismatch_high` say nothing. TIS' are slime's
(`--tis-clip-low`, `--tis-clip`), IcePop's those of MiMo."""

TOPK_LOSSES = frozenset(name for name, facts in LOSSES.items() if facts.needs is Needs.TOPK)
"""Those that need the teacher's top-k on the wire."""
FULL_LOSSES = frozenset(name for name, facts in LOSSES.items() if facts.needs is Needs.FULL)
"""Those on the whole vocabulary, exact: the teacher must be in the learner's ranks."""
RATIO_LOSSES = frozenset(name for name, facts in LOSSES.items() if facts.ratio)
"""Those with a signal on the sampled token, and so an importance ratio."""
GIVEN_LOSSES = frozenset(name for name, facts in LOSSES.items() if facts.given)
"""Those for responses that a data set gives, and for no others."""
WHOLE_RESPONSE_LOSSES = frozenset(name for name, facts in LOSSES.items() if facts.whole)
"""Those whose signal on a token depends on what follows it."""
SAMPLED_LOSSES = frozenset(name for name in RATIO_LOSSES if LOSSES[name].needs is Needs.NOTHING)
"""Those on the sampled token alone: one number per token from the teacher."""

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
    facts = LOSSES.get(name)
    if facts is None:
        return None
    if facts.needs is Needs.FULL and not in_learner:
        instead = facts.twin or _others(Needs.FULL)
        return (
            f"{name} needs the teacher's whole distribution, and an engine gives its top-k at most; write {instead}, "
            "or opd.type megatron"
        )
    if facts.needs is Needs.TOPK and in_learner:
        instead = facts.twin or _others(Needs.TOPK)
        return f"{name} is for a teacher behind an engine; this one gives its whole distribution: write {instead}"
    return None


def _others(needs: Needs) -> str:
    """The losses on the student's own samples that do not need `needs`, in words."""
    return " or ".join(name for name, facts in LOSSES.items() if facts.needs is not needs and not facts.given)


def idle_options(name: str, *, ratio: bool) -> tuple[str, ...]:
    """Keys of the section `opd` that do nothing to the loss `name`; `ratio`: an estimator brings one of its own."""
    facts = LOSSES[name]
    acting = {*facts.options, *(RATIO_OPTIONS if facts.ratio else RATIO_OPTIONS[1:] if ratio else ())}
    return tuple(key for key in OPTIONS if key not in acting)


OPTIONS = tuple(dict.fromkeys([*RATIO_OPTIONS, *(key for facts in LOSSES.values() for key in facts.options)]))
"""Keys of the section `opd` that act on some losses only."""


def documentation() -> list[str]:
    """The rows of the table of losses, markdown."""
    return [
        f"| `{name}`{' (default)' * (name == DEFAULT_LOSS)} | {facts.formula} | {facts.looks_at} | {facts.wire} |"
        for name, facts in LOSSES.items()
    ]


if __name__ == "__main__":
    print("\n".join(documentation()))
