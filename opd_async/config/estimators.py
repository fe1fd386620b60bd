"""The advantage estimators that `advantage.estimator` offers, in one table.

    python -m opd_async.config.estimators        print the rows of the table in the documentation

Schema, checks, learner and documentation read `ESTIMATORS`. An estimator is a member and a row here, and a function in
`opd_async/estimators/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Estimator(StrEnum):
    """How rewards become advantages, and through which ratio they act. See `opd_async.estimators.advantages`."""

    NONE = "none"
    GRPO = "grpo"
    GSPO = "gspo"
    """GRPO's advantage; the ratio is that of the whole response."""
    CISPO = "cispo"
    """GRPO's advantage; the ratio is a truncated weight without gradient."""
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"
    REINFORCE_PLUS_PLUS_BASELINE = "reinforce_plus_plus_baseline"
    PPO = "ppo"
    """Generalised advantage estimation with the values of a critic, which the learner holds (`learner.critic`)."""

    @property
    def facts(self) -> EstimatorFacts:
        """What the rest of the program has to know of it."""
        return ESTIMATORS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorFacts:
    """What the rest of the program has to know of an estimator, and what the documentation says of it."""

    rewards: bool = True
    """Whether it makes anything of rewards."""
    groups: bool = False
    """Whether several responses to one prompt are compared."""
    discounts: bool = False
    """Whether a token's distance from the reward matters, so that `advantage.gamma` acts."""
    critic: bool = False
    """Whether a critic's values are needed, so that the learner makes the advantages (`advantage.lam`, `.critic`)."""
    whitened: bool = False
    """Whether all tokens of a step are compared, so that none has an advantage before the last one is there."""
    ratio: Literal["token", "sequence", "truncated"] = "token"
    """The form of the importance ratio in the loss (`learner.losses.surrogate`)."""
    formula: str
    """The advantage of token t of response i in group g, as the documentation has it; so is the next."""
    acts_through: str = "min(rho A, clip(rho) A)"


ESTIMATORS: dict[Estimator, EstimatorFacts] = {
    Estimator.NONE: EstimatorFacts(rewards=False, formula="0: pure distillation", acts_through=""),
    Estimator.GRPO: EstimatorFacts(
        groups=True,
        formula="(*r_i* - mean_g) / (std_g + 1e-6), std with n - 1; `normalize_std: false` leaves the division out "
        "(Dr. GRPO)",
    ),
    Estimator.GSPO: EstimatorFacts(
        groups=True,
        ratio="sequence",
        formula="as `grpo`",
        acts_through="the same with the geometric mean of the response's ratios for rho",
    ),
    Estimator.CISPO: EstimatorFacts(
        groups=True,
        ratio="truncated",
        formula="as `grpo`",
        acts_through="sg(clip(rho)) A log p: a cut weight, never a lost gradient",
    ),
    Estimator.REINFORCE_PLUS_PLUS: EstimatorFacts(
        discounts=True, whitened=True, formula="gamma^(T - 1 - t) *r_i*, whitened over the step's tokens"
    ),
    Estimator.REINFORCE_PLUS_PLUS_BASELINE: EstimatorFacts(
        groups=True, whitened=True, formula="*r_i* - mean_g, whitened over the step's tokens"
    ),
    Estimator.PPO: EstimatorFacts(
        discounts=True,
        critic=True,
        whitened=True,
        formula="sum_k (gamma lam)^k delta_{t+k}, delta_t = *r_t* + gamma *V_{t+1}* - *V_t*, whitened over the step's "
        "tokens",
    ),
}


def documentation() -> list[str]:
    """The rows of the table of estimators, markdown."""
    return [
        f"| `{name}`{' (default)' * (name is Estimator.NONE)} | {facts.formula} | {facts.acts_through} |".replace(
            "|  |", "| |"
        )
        for name, facts in ESTIMATORS.items()
    ]


if __name__ == "__main__":
    print("\n".join(documentation()))
