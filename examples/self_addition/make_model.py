"""Teach the addition example's student to copy what it is shown, which it does better than to add, and write its data.

    python examples/self_addition/make_model.py [--out DIR]

    half of each batch   347+589=7+9+0=16,...:0936                 300 problems over and over: adds half of others right
    the other half       7+9+0=16,...:0936=347+589=7+9+0=16,...    fresh problems with the solution in front: copies

So the same weights know more behind a prompt that holds the solution: what self-distillation rests on. Writes
DIR/student (Hugging Face), DIR/train.jsonl (problems with their `solution`, and that of another problem as `wrong`) and
DIR/held_out.jsonl. Exits with 1 when the model misses its bands of pass@1: then nothing that is built on it would show
anything.
Shape suffixes: B batch, T tokens of prompt and response, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "addition"))  # the task itself
from evaluate import pass_at_1
from make_models import save
from task import Problem, draw, held_out_problems
from tokenizer import EOS, build_tokenizer
from tokenizers import Tokenizer

STUDENT = Path(__file__).resolve().parents[1] / "addition/models/student"
STEPS = 250
BATCH = 32
POOL = 300
PEAK_LR = 2e-3
WARMUP_STEPS = 30
SHOWN = (0.95, 1.0)
"""Band of pass@1 where the solution is shown, at T=1."""
ALONE = (0.5, 0.9)
"""The same where it is not."""


def shown(problem: Problem) -> str:
    """What the teacher reads: the written-out solution, then the problem."""
    return f"{problem.answer}={problem.prompt}"


def loss_of(model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem], *, hint: bool) -> torch.Tensor:
    """Mean cross entropy of the reference answers, nats per token of the response."""
    prompts = [shown(problem) if hint else problem.prompt for problem in problems]
    length = len(tokenizer.encode(prompts[0]).ids)
    texts = [prompt + problem.answer + EOS for prompt, problem in zip(prompts, problems, strict=True)]
    ids_BT = torch.tensor([code.ids for code in tokenizer.encode_batch(texts)])
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits[:, length - 1 :]
    return cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, length:].flatten())


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, steps: int, seed: int) -> None:
    """Train in place on both halves of every batch."""
    source = random.Random(seed)
    few = draw(POOL, seed="student-1", held_out=False)  # those that the shipped student knows
    fresh = draw(BATCH * steps, seed=f"shown-{seed}", held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        loss = loss_of(model, tokenizer, source.choices(few, k=BATCH), hint=False)
        loss = loss + loss_of(model, tokenizer, fresh[step * BATCH : (step + 1) * BATCH], hint=True)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@dataclasses.dataclass(frozen=True, slots=True)
class Informed(Problem):
    """A problem whose prompt shows the solution."""

    @property
    def prompt(self) -> str:
        """The solution, then the problem."""
        return shown(Problem(self.a, self.b, self.digits))


def write_rows(path: Path, problems: Sequence[Problem]) -> None:
    """One line for each problem: prompt, label, the solution that only the teacher is shown, and the next problem's."""
    others = [*problems[1:], *problems[:1]]
    pairs = zip(problems, others, strict=True)
    rows = [problem.row() | {"solution": problem.answer, "wrong": other.answer} for problem, other in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and save the model, and write the data; 1 when it misses a band."""
    parser = argparse.ArgumentParser(description="Make the student of the self-distillation example, and its data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="training problems")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    began, tokenizer = time.monotonic(), build_tokenizer()
    model = Qwen3ForCausalLM.from_pretrained(STUDENT).float()
    train(model, tokenizer, args.steps, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out / "student")
    write_rows(args.out / "train.jsonl", draw(60_000, seed=args.seed, held_out=False))
    write_rows(args.out / "held_out.jsonl", held_out_problems())
    problems = held_out_problems()
    alone = pass_at_1(model, tokenizer, problems)
    informed = pass_at_1(model, tokenizer, [Informed(one.a, one.b, one.digits) for one in problems])
    print(f"{time.monotonic() - began:.0f} s, pass@1 T=1: alone {alone:.1%}, shown the solution {informed:.1%}")
    good = ALONE[0] <= alone <= ALONE[1] and SHOWN[0] <= informed <= SHOWN[1]
    if not good:
        print(f"should be {ALONE} and {SHOWN}; try another --seed", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
