"""Write a model's responses to a file of prompts: `python examples/addition/sample.py MODEL --out FILE`.

    prompts (JSONL) -> MODEL at T=1, several responses a prompt -> FILE: {"prompt": ..., "completion": ...}

What supervised fine-tuning on a teacher is given: `data.completions` of a topology. Unfinished responses are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from evaluate import BATCH, respond
from task import Problem, read_rows
from tokenizer import EOS_ID
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM


def completions(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem], per_prompt: int
) -> Iterator[dict[str, str]]:
    """`per_prompt` sampled responses to each problem, those of a batch of problems together; only finished ones."""
    model.eval()
    asked = [problem for problem in problems for _ in range(per_prompt)]
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        prompts_BP = torch.tensor([code.ids for code in tokenizer.encode_batch([p.prompt for p in batch])])
        found_BT = respond(model, prompts_BP, greedy=False, digits=batch[0].digits)
        for problem, ids in zip(batch, found_BT.tolist(), strict=True):
            if EOS_ID in ids:
                text = tokenizer.decode(ids[: ids.index(EOS_ID)], skip_special_tokens=False)
                yield {"prompt": problem.prompt, "completion": text}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the file, whole or not at all."""
    parser = argparse.ArgumentParser(description="Sample a model's responses to prompts.")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "data" / "train.jsonl")
    parser.add_argument("--count", type=int, default=1600, help="prompts, from the first on")
    parser.add_argument("--per-prompt", type=int, default=8, help="responses a prompt")
    parser.add_argument("--seed", type=int, default=0, help="draws the responses")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    problems = [problem for problem, _ in zip(read_rows(args.prompts), range(args.count), strict=False)]
    model = Qwen3ForCausalLM.from_pretrained(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in completions(model, tokenizer, problems, args.per_prompt))
    partial.replace(args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
