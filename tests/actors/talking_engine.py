"""An engine that says what a test has written down, letter by letter, and a tokenizer of letters to read it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from faulty_engine import FaultyEngine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

START, END = "<|im_start|>", "<|im_end|>"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
STARTS, ENDS = len(LETTERS), len(LETTERS) + 1
VOCAB = len(LETTERS) + 2
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> Tokenizer:
    """Bytes and the special tokens of ChatML, with its template."""
    library = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": END}))
    return library


class TalkingEngine(FaultyEngine):
    """Answers each request with the next of `answers`, up to its limit, and at last with nothing.

    Every answer ends with the end of a turn.
    """

    def __init__(self, tokenizer: Tokenizer, *answers: str) -> None:
        super().__init__()
        self.answers = list(answers)
        self._tokenizer = tokenizer

    def read(self) -> list[str]:
        """The text in front of each answer."""
        bodies = [body["input_ids"] for body in self.seen if body.get("stream")]
        return [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in bodies]

    def _tokens(self, body: dict[str, Any]) -> list[Any]:  # type: ignore[override]
        limit = body["sampling_params"]["max_new_tokens"]
        ids = [*self._tokenizer.encode(self.answers.pop(0) if self.answers else "").ids, ENDS][:limit]
        events = []
        for at in range(0, len(ids), 2):
            part = ids[at : at + 2]
            done = at + len(part)
            finish = {"type": "stop" if ids[-1] == ENDS else "length"} if done == len(ids) else None
            meta = {
                "output_token_logprobs": [[-0.5, token, None] for token in part],
                "completion_tokens": done,
                "finish_reason": finish,
                "weight_version": "0",
            }
            events.append({"output_ids": part, "meta_info": meta})
        return events
