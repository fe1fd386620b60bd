"""Divergences over whole vocabularies in float64, one token after another; shared with the multi-rank worker script."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_async.learner.losses.full_divergences import row_divergences
from opd_async.learner.losses.logprobs import Head

STUDENT = [2.0, 1.0, 0.5, -0.5, -1.0]
TEACHER = [1.5, 1.8, -0.2, 0.3, -1.2]
GOLDEN: dict[str, tuple[float, list[float]]] = {
    "forward_kl_full": (0.2132049, [0.235707, -0.251792, 0.066536, -0.056182, 0.005731]),
    "reverse_kl_full": (0.1987494, [0.187063, -0.208767, 0.067641, -0.046582, 0.000644]),
    "minillm_full": (0.1987494, [0.187063, -0.208767, 0.067641, -0.046582, 0.000644]),
}
GOLDEN_JSD = {0.1: 0.0189072, 0.5: 0.0504601, 0.9: 0.0178914}


def enumerated(loss: str, student_V: Tensor, teacher_U: Tensor, beta: float) -> Tensor:
    """The divergence of one row of float64 logits, from its definition; of ids beyond the V of the student, p is 0.

    The forward KL would be infinite there: it is that of the teacher given that the id is one of the V.
    """
    p, q, count = student_V.softmax(-1), teacher_U.softmax(-1), len(student_V)
    if loss == "forward_kl_full":
        q = q[:count] / q[:count].sum()
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=False):
        m = beta * b + (1.0 - beta) * a
        total = (
            total
            + {
                "forward_kl_full": lambda a=a, b=b: b * (b / a).log(),
                "reverse_kl_full": lambda a=a, b=b: a * (a / b).log(),
                "minillm_full": lambda a=a, b=b: a * (a / b).log(),
                "jsd_full": lambda a=a, b=b, m=m: beta * b * (b / m).log() + (1.0 - beta) * a * (a / m).log(),
            }[loss]()
        )
    if loss == "jsd_full":
        for b in q[count:]:
            total = total + beta * b * (b / (beta * b)).log()
    return total


class Problem:
    """Random hidden states, heads and weights of a sum; `vocab` ids, `padding` rows of the heads behind them, and so
    many ids `beyond` that the teacher alone has."""

    def __init__(
        self,
        seed: int,
        *,
        rows: int = 7,
        hidden: int = 4,
        wider: int = 6,
        vocab: int = 9,
        padding: int = 1,
        beyond: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.hidden, self.teacher = torch.randn(rows, hidden, generator=generator), None
        self.head = torch.randn(vocab + padding, hidden, generator=generator)
        self.teacher_hidden = torch.randn(rows, wider, generator=generator)
        self.teacher_head = torch.randn(vocab + padding, wider, generator=generator)
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.mix = torch.randn(2, rows, generator=generator)
        self.beyond = torch.randn(beyond, wider, generator=generator)

    def expected(self, loss: str, beta: float) -> list[Tensor]:
        """log p(y), log q(y), the divergence, and the gradients of hidden states and head; float64."""
        hidden, head = self.hidden.double().requires_grad_(), self.head.double().requires_grad_()
        student = hidden @ head[: self.vocab].T
        teacher = self.teacher_hidden.double() @ torch.cat([self.teacher_head[: self.vocab], self.beyond]).double().T
        rows = torch.arange(len(self.targets))
        sampled = student.log_softmax(-1)[rows, self.targets]
        value = torch.stack([enumerated(loss, s, t, beta) for s, t in zip(student, teacher, strict=True)])
        (self.mix[0] * sampled + self.mix[1] * value).sum().backward()
        assert hidden.grad is not None and head.grad is not None
        logq = teacher.log_softmax(-1)[rows, self.targets]
        return [sampled.detach(), logq, value.detach(), hidden.grad, head.grad]

    def found(self, loss: str, beta: float, chunk_rows: int, group: dist.ProcessGroup) -> list[Tensor]:
        """The same by the learner; heads are cut between the ranks of `group`, and the gradient put together again."""
        hidden, head = self.hidden.clone().requires_grad_(), self.head.chunk(group.size())[group.rank()].clone()
        head.requires_grad_()
        options: dict[str, Any] = {"vocab": self.vocab, "chunk_rows": chunk_rows, "group": group}
        own, theirs = Head(weight=head, **options), self.teacher_head.chunk(group.size())[group.rank()]
        beyond = self.beyond.tensor_split(group.size())[group.size() - 1 - group.rank()] if len(self.beyond) else None
        teacher_head = Head(weight=theirs, **options, beyond=beyond)
        rows = row_divergences(hidden, own, self.teacher_hidden, teacher_head, self.targets, loss=loss, beta=beta)
        (self.mix[0] * rows.sampled_R + self.mix[1] * rows.divergence_R).sum().backward()
        assert hidden.grad is not None and head.grad is not None and not rows.teacher_R.requires_grad
        parts = [torch.empty_like(head.grad) for _ in range(group.size())]
        dist.all_gather(parts, head.grad, group=group)
        return [rows.sampled_R.detach(), rows.teacher_R, rows.divergence_R.detach(), hidden.grad, torch.cat(parts)]


SHAPES = {
    "": {},
    " and ids beyond": {"beyond": 5},
    " and one id beyond, on the other rank": {"beyond": 1},
    " and all ids on the first rank": {"vocab": 4, "padding": 6, "beyond": 3},
}


def furthest(group: dist.ProcessGroup) -> dict[str, float]:
    """The largest difference to float64 of any value or gradient, for each loss, chunk size and shape of the heads."""
    result = {}
    for loss in (*GOLDEN, "jsd_full"):
        for chunk_rows, (shape, sizes) in itertools.product((1, 1000), SHAPES.items()):
            for seed in range(3):
                problem = Problem(seed, **sizes)
                pairs = zip(problem.found(loss, 0.3, chunk_rows, group), problem.expected(loss, 0.3), strict=True)
                worst = max(float((ours.double() - theirs).abs().max()) for ours, theirs in pairs)
                key = f"{loss} in chunks of {chunk_rows}{shape}"
                result[key] = max(worst, result.get(key, 0.0))
    return result
