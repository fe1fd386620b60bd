"""Train the calculator's teacher and student from scratch, and write the data.

    python examples/calculator/make_pair.py [--out DIR]

    expressions (expressions.py) -> transcripts -> supervised training -> DIR/teacher, DIR/student (Hugging Face)
                                 -> DIR/train.jsonl, DIR/held_out.jsonl

The teacher sees fresh problems at every step. The student, a quarter of its size, sees the same few over and over: it
knows how calls look, and copies numbers wrongly. Only what the model says counts in the loss, not what it is given.

Exits with 1 when a model misses its band: then nothing that is built on it would show anything.
Shape suffixes: B batch, T tokens of prompt and response but the last, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "addition"))  # its models' shape and tokenizer
from expressions import ALPHABET, Problem, draw, held_out_problems, transcript
from make_models import PEAK_LR, Recipe, build_model, learning_rate, save
from tokenizer import EOS, PAD_ID, build_tokenizer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64
IGNORED = -100
"""The label of a token that does not count: cross_entropy's own default."""
TEACHER = Recipe("teacher", hidden=128, steps=1200, pool=None, band=(0.97, 1.0))
STUDENT = Recipe("student", hidden=64, steps=450, pool=300, band=(0.1, 0.7))


def encode(tokenizer: Tokenizer, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Inputs int64[B, T] and labels int64[B, T], the next token each, IGNORED where the model does not say it."""
    rows, labels = [], []
    for problem in problems:
        text, said = transcript(problem)
        ids = tokenizer.encode(problem.prompt + text + EOS).ids
        counts = [False] * (len(ids) - 1 - len(said)) + [*said, True]
        rows.append(ids[:-1])
        labels.append([token if own else IGNORED for token, own in zip(ids[1:], counts[1:], strict=True)])
    length = max(map(len, rows))
    # what is behind the end has no label, and nothing in front of it sees it
    inputs_BT = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
    labels_BT = torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])
    return inputs_BT, labels_BT


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
    """Supervised training in place on reference transcripts."""
    source = random.Random(seed)
    problems = draw(recipe.pool or BATCH * recipe.steps, seed=f"{recipe.name}-{seed}", held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(recipe.steps):
        few = source.choices(problems, k=BATCH) if recipe.pool else problems[step * BATCH : (step + 1) * BATCH]
        inputs_BT, labels_BT = encode(tokenizer, few)
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def share_right(model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem]) -> tuple[float, float]:
    """Share of problems whose episode is the reference transcript: expected at T=1, and greedy.

    Exact, without sampling: the product of the probabilities of what the model should say, and whether each is its
    most likely token. Another way to the right answer is not counted, so pass@1 is a little higher.
    """
    model.eval()
    sampled = greedy = 0.0
    for start in range(0, len(problems), BATCH):
        inputs_BT, labels_BT = encode(tokenizer, problems[start : start + BATCH])
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        nats_BT = cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
        sampled += float((-nats_BT.sum(1)).exp().sum())
        greedy += int(((logits_BTV.argmax(-1) == labels_BT) | (labels_BT == IGNORED)).all(1).sum())
    return sampled / len(problems), greedy / len(problems)


def make_model(recipe: Recipe, out: Path, seed: int) -> bool:
    """Train, measure and save one model; whether its share at T=1 lies in its band."""
    began, tokenizer = time.monotonic(), build_tokenizer(ALPHABET)
    model = build_model(recipe, seed)
    train(model, tokenizer, recipe, seed)
    seconds = time.monotonic() - began
    save(model, out / recipe.name, ALPHABET)
    sampled, greedy = share_right(model, tokenizer, held_out_problems())
    print(f"{out / recipe.name}: {seconds:.0f} s, right at T=1 {sampled:.1%}, greedy {greedy:.1%}", flush=True)
    low, high = recipe.band
    if low <= sampled <= high:
        return True
    print(f"{recipe.name}: T=1 should be {low:.0%} to {high:.0%}; try another --seed", file=sys.stderr)
    return False


def write_rows(path: Path, problems: Sequence[Problem]) -> None:
    """One line for each problem."""
    path.write_text("".join(json.dumps(problem.row()) + "\n" for problem in problems), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data, train both models; 1 when one misses its band."""
    parser = argparse.ArgumentParser(description="Make the calculator example's models and data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="initial weights and training problems")
    parser.add_argument("--only", choices=[STUDENT.name, TEACHER.name], help="train one of the two")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "train.jsonl", draw(60_000, seed=args.seed, held_out=False))
    write_rows(args.out / "held_out.jsonl", held_out_problems())
    chosen = [recipe for recipe in (STUDENT, TEACHER) if args.only in (None, recipe.name)]
    good = [make_model(recipe, args.out, args.seed) for recipe in chosen]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
