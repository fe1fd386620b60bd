"""Measure pass@1 on the held-out problems: `python examples/addition/evaluate.py MODEL [MODEL ...]`.

    MODEL (Hugging Face directory) -> one response a prompt, T=1 and greedy -> share of right answers

Prints one line a model: pass@1 at T=1 for each sampling seed, then greedy. Reads tokenizer.json from the model's own
directory. One standard error at n=1000 is 1.6 points at 50 % and 0.6 points at 96 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from task import DIGITS, Problem, held_out_problems, is_correct, response_tokens
from tokenizer import EOS_ID, PAD_ID
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

if TYPE_CHECKING:
    from torch import Tensor

#: Prompts generated at once; 512 keep the KV cache in a few MB.
BATCH = 512


@torch.no_grad()
def respond(model: Qwen3ForCausalLM, prompts_BP: Tensor, *, greedy: bool, digits: int = DIGITS) -> Tensor:
    """Generate int64[B, T] response ids, padded after <eos>; T is at most `response_tokens(digits)`.

    Sampling is at T=1 from the whole distribution and draws from torch's global generator.
    """
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    full_BT: Tensor = model.generate(
        prompts_BP,
        attention_mask=torch.ones_like(prompts_BP),
        max_new_tokens=response_tokens(digits),
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        **how,
    )
    return full_BT[:, prompts_BP.shape[1] :]


def pass_at_1(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem], *, greedy: bool = False, seed: int = 0
) -> float:
    """Share of problems answered rightly, in [0, 1], one response each; an unfinished response is wrong."""
    model.eval()
    torch.manual_seed(seed)
    right = 0
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        # every prompt has the same length, so there is nothing to pad
        prompts_BP = torch.tensor([code.ids for code in tokenizer.encode_batch([p.prompt for p in batch])])
        found_BT = respond(model, prompts_BP, greedy=greedy, digits=batch[0].digits)
        for problem, ids in zip(batch, found_BT.tolist(), strict=True):
            if EOS_ID in ids:
                text = tokenizer.decode(ids[: ids.index(EOS_ID)], skip_special_tokens=False)
                right += is_correct(text, problem.label)
    return right / len(problems)


def report(model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem], seeds: Sequence[int]) -> str:
    """One line: pass@1 in percent at T=1 for each seed, and greedy."""
    sampled = [pass_at_1(model, tokenizer, problems, seed=seed) for seed in seeds]
    greedy = pass_at_1(model, tokenizer, problems, greedy=True)
    return f"pass@1 T=1 {' '.join(f'{100 * share:.1f}' for share in sampled)}  greedy {100 * greedy:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print one line a model."""
    parser = argparse.ArgumentParser(description="Measure pass@1 of models on the held-out additions.")
    parser.add_argument("models", type=Path, nargs="+", help="Hugging Face model directories")
    parser.add_argument("--digits", type=int, default=DIGITS, help="digits of each number")
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="sampling seeds")
    args = parser.parse_args(argv)
    problems = held_out_problems(args.problems, args.digits)
    for path in args.models:
        model = Qwen3ForCausalLM.from_pretrained(path)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        print(f"{path}: {report(model, tokenizer, problems, args.seeds)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
