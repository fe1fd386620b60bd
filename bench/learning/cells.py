"""The runs to compare: a part is a list of cells, and a cell is a regime, a method, a bound on staleness and a seed.

All methods take the same number of optimizer steps and of responses in each, with one learner, one schedule of learning
rates and one evaluation; each has a learning rate that served it well (part `rates`). A response is to a prompt of its
own, but for those with GRPO, which compare responses to one prompt; `opd_16` is OPD on their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

GROUP = 8
SAMPLES_PER_STEP = 128
TOPK = 8
RATES = (5e-4, 1e-3, 2e-3)
CURVE_STEPS = 20
"""An evaluation every so many steps."""

SAMPLED = ("opd.loss=reverse_kl", "opd.signal_clamp=3.0")
ON_POLICY_TEACHER = (*SAMPLED, "opd.clip_ratio=0.2")
JSD = ("opd.loss=jsd_topk", f"opd.topk={TOPK}")
FULL = ("opd.type=megatron", "opd.loss=reverse_kl_full")
REWARD = ("reward.kind=exact_match", "advantage.estimator=grpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to learn, as settings of a topology."""

    title: str
    settings: tuple[str, ...]
    lr: float
    given: bool = False
    """Trains on responses that the teacher wrote beforehand, and on none of the student's."""
    options: tuple[str, ...] = ()
    """Flags of the launcher."""
    teacher_inside: bool = False
    """The learner holds the teacher."""
    group: int = 1
    """Responses to each prompt."""
    of_itself: bool = False
    """The student is its own teacher."""


METHODS = {
    "sft": Method(title="SFT on teacher samples", settings=("opd.loss=sft",), lr=2e-3, given=True),
    "kd": Method(title="JSD on teacher samples", settings=JSD, lr=2e-3, given=True),
    "opd": Method(title="OPD: reverse KL, sampled token", settings=ON_POLICY_TEACHER, lr=1e-3),
    "opd_jsd": Method(title="OPD: JSD, top-k", settings=JSD, lr=2e-3),
    "opd_full": Method(title="OPD: reverse KL, full vocabulary", settings=FULL, lr=2e-3, teacher_inside=True),
    "opd_16": Method(title=f"OPD, sampled token, {GROUP} a prompt", settings=ON_POLICY_TEACHER, lr=5e-4, group=GROUP),
    "grpo": Method(
        title=f"GRPO on the reward, {GROUP} a prompt", settings=REWARD, lr=5e-4, options=("--no-use-opd",), group=GROUP
    ),
    "opd_grpo": Method(
        title=f"OPD + GRPO, {GROUP} a prompt", settings=(*ON_POLICY_TEACHER, *REWARD), lr=5e-4, group=GROUP
    ),
}

OF_ITSELF = ("opd.type=self", "opd.loss=jsd_full")
SHOWN = {
    "frozen": Method(
        title="itself, shown the solution: frozen",
        settings=(*OF_ITSELF, "opd.self.weights=frozen"),
        lr=2e-3,
        of_itself=True,
    ),
    "ema": Method(
        title="... an average of decay 0.99",
        settings=(*OF_ITSELF, "opd.self.weights=ema", "opd.self.decay=0.99"),
        lr=3e-4,
        of_itself=True,
    ),
    "live": Method(title="... live", settings=(*OF_ITSELF, "opd.self.weights=live"), lr=3e-4, of_itself=True),
    "larger": Method(
        title="a larger teacher, shown nothing",
        settings=("opd.type=megatron", "opd.loss=jsd_full", "data.teacher_prompt=null"),
        lr=2e-3,
        teacher_inside=True,
    ),
    "sft_solutions": Method(
        title="SFT on the solutions",
        settings=(
            *("opd.type=megatron", "opd.loss=sft", "data.teacher_prompt=null"),
            "data.completions.completion_key=solution",
        ),
        lr=2e-3,
        given=True,
        teacher_inside=True,
    ),
}
"""Who teaches a student that gets better where it is shown the solution (`examples/self_addition`)."""

HOT = 2e-3
"""A learning rate at which one step moves this student far enough for age to matter."""
SIGNALS = {
    "sampled_clip": Method(title="sampled token, clip 0.2", settings=ON_POLICY_TEACHER, lr=HOT),
    "sampled": Method(title="sampled token, no clip", settings=(*SAMPLED, "opd.clip_ratio=null"), lr=HOT),
    "topk": Method(title="top-k (JSD)", settings=JSD, lr=HOT),
    "full": Method(title="full vocabulary (reverse KL)", settings=FULL, lr=HOT, teacher_inside=True),
}
STALENESS = (0, 1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Which problems, and which student and teacher."""

    title: str
    digits: int = 3
    prompts: int = 60_000
    student: str = "student"
    """A recipe of `bench.learning.inputs`, or the example's own model."""
    teacher: str = "teacher"
    steps: int = 100
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of methods that were served better by another than their own."""
    topology: str = "examples/quickstart.yaml"
    """What the settings are of."""
    samples: int = SAMPLES_PER_STEP
    """Responses of full length in a step's budget."""
    warmup: int = 10
    """Steps until the learning rate is what it should be."""


REGIMES = {
    "short": Regime(title="3 digits, 60,000 prompts"),
    "few": Regime(title="3 digits, 64 prompts", prompts=64),
    "long": Regime(title="6 digits, 60,000 prompts", digits=6, student="student_6", teacher="teacher_6"),
    "small": Regime(title="3 digits, a student of 5 thousand weights", student="student_small"),
    "paced": Regime(title="3 digits, 60,000 prompts, a constant rate", steps=60),
    "ways": Regime(
        title="3 digits, a teacher that writes in two ways",
        teacher="teacher_ways",
        rates={"sft": 8e-3, "opd_full": 5e-4, "opd_jsd": 5e-4},
    ),
    "shown": Regime(
        title="3 digits, a student that copies better than it adds",
        student="student_shown",
        steps=120,
        topology="examples/self_addition/self_addition.yaml",
        samples=256,
        warmup=20,
    ),
    "ways5k": Regime(
        title="two ways, and a student of 5 thousand weights",
        student="student_small",
        teacher="teacher_ways",
        rates={"sft": 8e-3},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run."""

    part: str
    regime: str
    method: str
    seed: int
    lr: float
    staleness: int | None = 1
    rule: str = "deadline"
    train_on: str = "samples"
    slots: int = SAMPLES_PER_STEP
    extra: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The run's name, and its folder's; parts that ask for the same run share it."""
        bound = "none" if self.staleness is None else str(self.staleness)
        rule = "" if self.rule == "deadline" else f"-{self.rule}"
        return f"{self.regime}-{self.method}-{self.train_on}{rule}-S{bound}-lr{self.lr:g}-seed{self.seed}"

    @property
    def how(self) -> Method:
        """The method or signal."""
        signals = {"staleness": SIGNALS, "rules": SIGNALS, "shown": SHOWN}
        return signals.get(self.part, METHODS)[self.method]


def rates(seeds: int) -> list[Cell]:
    """Every method at every learning rate, one seed."""
    return [
        Cell(part="rates", regime="short", method=method, seed=0, lr=lr)
        for lr in RATES
        for method in METHODS
        if method != "opd_16"
    ]


def methods(seeds: int) -> list[Cell]:
    """Every method at its own learning rate."""
    return [
        Cell(part="methods", regime="short", method=name, seed=seed, lr=how.lr)
        for seed in range(seeds)
        for name, how in METHODS.items()
    ]


def regimes(seeds: int) -> list[Cell]:
    """Where it may matter whose prefixes are trained, and which way a divergence is taken."""
    names = ("sft", "kd", "opd", "opd_jsd", "opd_full")
    return [
        Cell(
            part="regimes", regime=regime, method=name, seed=seed, lr=REGIMES[regime].rates.get(name, METHODS[name].lr)
        )
        for seed in range(seeds)
        for regime in REGIMES
        if regime not in ("short", "paced", "shown")
        for name in names
    ]


def staleness(seeds: int) -> list[Cell]:
    """Every signal at every bound; slots for S + 1 steps, so that tokens do get that old."""
    return [
        Cell(
            part="staleness",
            regime="short",
            method=name,
            seed=seed,
            lr=how.lr,
            staleness=bound,
            train_on="tokens",
            slots=SAMPLES_PER_STEP * (bound + 1),
        )
        for seed in range(seeds)
        for bound in STALENESS
        for name, how in SIGNALS.items()
        if bound or name != "sampled"  # at age 0 every ratio is 1, and there is nothing to clip
    ]


RULES: tuple[tuple[str, int | None], ...] = (
    *(("deadline", 1), ("deadline", 2)),
    *(("filled", 1), ("filled", 2), ("filled", None)),
)
"""`filled` without a bound is PipelineRL's trainer."""


def rules(seeds: int) -> list[Cell]:
    """Steps of one budget against those that take all that is due, at equal tokens; slots for three steps.

    The rate is constant, so that a curve does not depend on how many steps its rule makes of the same tokens.
    """
    return [
        Cell(
            part="rules",
            regime="paced",
            method=name,
            seed=seed,
            lr=HOT,
            staleness=bound,
            rule=rule,
            train_on="tokens",
            slots=SAMPLES_PER_STEP * 3,
            extra=("learner.optimizer.decay=constant", "evaluation.every_steps=10"),
        )
        for seed in range(seeds)
        for rule, bound in RULES
        for name in ("sampled_clip", "topk")
    ]


def shown(seeds: int) -> list[Cell]:
    """Self-distillation on the written-out solution, against a larger teacher and against SFT on the solutions."""
    return [
        Cell(part="shown", regime="shown", method=name, seed=seed, lr=how.lr, train_on="tokens", slots=256)
        for seed in range(seeds)
        for name, how in SHOWN.items()
    ]


PARTS: dict[str, Callable[[int], list[Cell]]] = {
    "rates": rates,
    "methods": methods,
    "regimes": regimes,
    "staleness": staleness,
    "rules": rules,
    "shown": shown,
}
