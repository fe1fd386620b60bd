"""Train the quickstart's teacher and student, or variants: `python examples/addition/make_models.py [--out DIR]`.

    problems (task.py) -> supervised training from scratch -> DIR/teacher, DIR/student (Hugging Face directories)

The teacher sees fresh problems at every step and learns to add. The student, a quarter of its size, sees the same 300
problems over and over: it knows the form of an answer and gets about half of new sums right, which leaves on-policy
distillation something to teach. Single-threaded, so that a seed gives the same weights on every run of one machine.

Exits with 1 when a model misses its band of pass@1: then nothing that is built on it would show anything.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate import pass_at_1
from task import ALPHABET, DIGITS, Problem, draw, held_out_problems
from tokenizer import BOS_ID, EOS, EOS_ID, PAD_ID, VOCAB_SIZE, build_tokenizer, save_tokenizer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

BATCH = 64
PEAK_LR = 3e-3
WARMUP_STEPS = 50
ROPE_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model: its shape, how long it is trained, and the pass@1 at T=1 that it must reach."""

    name: str
    hidden: int
    steps: int
    #: Number of different problems to train on; None draws new ones at every step.
    pool: int | None
    band: tuple[float, float]
    #: Share of the answers that have their columns the other way round.
    other_way: float = 0.0


TEACHER = Recipe("teacher", hidden=128, steps=500, pool=None, band=(0.98, 1.0))
STUDENT = Recipe("student", hidden=64, steps=450, pool=300, band=(0.50, 0.70))


def build_model(recipe: Recipe, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised two-layer Qwen3 in float32 with tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden // 4,
        max_position_embeddings=128,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 takes twice the steps at this width
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return Qwen3ForCausalLM(config).float()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a tenth of the peak."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.9 * step / steps)


def example(problem: Problem, recipe: Recipe, ways: random.Random) -> str:
    """Prompt and answer, in one of the ways in which the recipe's answers are written."""
    answer = problem.other_answer if ways.random() < recipe.other_way else problem.answer
    return problem.prompt + answer + EOS


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, recipe: Recipe, seed: int, digits: int = DIGITS) -> None:
    """Supervised training in place on the reference answers; only response tokens count in the loss."""
    source, ways = random.Random(seed), random.Random(f"ways-{seed}")
    count = recipe.pool or BATCH * recipe.steps
    problems = draw(count, seed=f"{recipe.name}-{seed}", held_out=False, digits=digits)
    prompt_tokens = len(tokenizer.encode(problems[0].prompt).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(recipe.steps):
        batch: list[Problem] = (
            source.choices(problems, k=BATCH) if recipe.pool else problems[step * BATCH : (step + 1) * BATCH]
        )
        texts = [example(problem, recipe, ways) for problem in batch]
        ids_BT = torch.tensor([code.ids for code in tokenizer.encode_batch(texts)])
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits[:, prompt_tokens - 1 :]
        loss = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, prompt_tokens:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def save(model: Qwen3ForCausalLM, directory: Path, alphabet: str = ALPHABET) -> None:
    """Write model, generation config and tokenizer as one Hugging Face directory."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0
    )
    model.save_pretrained(directory)
    save_tokenizer(directory, alphabet)
    # transformers 5 keeps the RoPE base in rope_parameters only; readers of the older format look for rope_theta
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"rope_theta": ROPE_THETA}
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


def make_model(recipe: Recipe, out: Path, seed: int, digits: int = DIGITS) -> bool:
    """Train, measure and save one model; whether its pass@1 at T=1 lies in its band."""
    began = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(recipe, seed)
    train(model, tokenizer, recipe, seed, digits)
    seconds = time.monotonic() - began
    directory = out / recipe.name
    save(model, directory)
    problems = held_out_problems(digits=digits)
    sampled, greedy = pass_at_1(model, tokenizer, problems), pass_at_1(model, tokenizer, problems, greedy=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{directory}: {count:,} parameters, {seconds:.0f} s, pass@1 T=1 {sampled:.1%}, greedy {greedy:.1%}", flush=True
    )
    low, high = recipe.band
    if low <= sampled <= high:
        return True
    print(f"{recipe.name}: pass@1 should be {low:.0%} to {high:.0%}; try another --seed", file=sys.stderr)
    return False


def variant(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe as the command line changes it; a changed one has no band to reach."""
    changes: dict[str, object] = {}
    if args.steps is not None:
        changes["steps"] = args.steps
    if args.hidden is not None:
        changes["hidden"] = args.hidden
    if args.other_way:
        changes["other_way"] = args.other_way
    if args.fresh:
        changes["pool"] = None
    if changes or args.digits != DIGITS:
        changes["band"] = (0.0, 1.0)
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]  # keys are the fields' names


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train both models; 1 when one misses its band."""
    parser = argparse.ArgumentParser(description="Train the addition task's teacher and student.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models", help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="initial weights and training problems")
    parser.add_argument("--only", choices=[STUDENT.name, TEACHER.name], help="train one of the two")
    parser.add_argument("--digits", type=int, default=DIGITS, help="digits of each number")
    parser.add_argument("--hidden", type=int, help="another width, a multiple of 8")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--other-way", type=float, default=0.0, help="share of answers written as 0+9+7=16")
    parser.add_argument("--fresh", action="store_true", help="new problems at every step, also for the student")
    args = parser.parse_args(argv)
    if not 0.0 <= args.other_way <= 1.0:
        parser.error(f"--other-way is a share, from 0 to 1; got {args.other_way:g}")
    torch.set_num_threads(1)
    disable_progress_bar()
    chosen = [recipe for recipe in (STUDENT, TEACHER) if args.only in (None, recipe.name)]
    good = [make_model(variant(recipe, args), args.out, args.seed, args.digits) for recipe in chosen]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
