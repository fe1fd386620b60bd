"""What an episode gives as messages: the words of a chat template, behind what the student has said."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from opd_async.actors.rollout.given_text import LONG, GivenText, beside_others, characters_of
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may speak') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if thinks is defined and not thinks %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
TOOL = [{"role": "tool", "content": "4"}, {"role": "user", "content": "And twice?"}]
BEHIND = f"\n{START}tool\n4{END}\n{START}user\nAnd twice?{END}\n{START}assistant\n"


@pytest.fixture
def text(tmp_path: Path) -> GivenText:
    """A tokenizer of bytes with the special tokens of ChatML."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": END}))
    return GivenText(Tokenizer(tmp_path), {})


def test_messages_go_on_behind_a_turn_that_the_student_has_ended(text: GivenText) -> None:
    [end] = text.encode(END, None).tolist()
    given = text.encode(TOOL, end)
    assert text.decode(given.tolist()) == BEHIND
    assert given.dtype == "int32"
    [start] = text.encode(START, None).tolist()
    assert (given == start).sum() == 3, "special tokens, not their letters"


def test_a_turn_that_was_cut_is_ended_first(text: GivenText) -> None:
    last = int(text.encode("x", None)[-1])
    assert text.decode(text.encode(TOOL, last).tolist()) == END + BEHIND


def test_the_template_sees_the_names_that_it_sees_in_prompts(text: GivenText, tmp_path: Path) -> None:
    """A student that is told not to think in its prompt is told so in every turn."""
    told = GivenText(Tokenizer(tmp_path), {"thinks": False})
    [end] = text.encode(END, None).tolist()
    assert told.decode(told.encode(TOOL, end).tolist()) == BEHIND + "<think></think>"


def test_text_is_given_as_it_is(text: GivenText) -> None:
    for given in ("", " = 4\n", "\N{SNOWMAN} \N{GREEK SMALL LETTER ALPHA}"):
        assert text.decode(text.encode(given, None).tolist()) == given


def test_a_template_that_refuses_says_so(text: GivenText) -> None:
    with pytest.raises(InputError, match="nobody may speak"):
        text.encode([{"role": "nobody", "content": "x"}], None)


async def test_a_long_text_holds_nobody_up() -> None:
    """The tokenizer waits for what the event loop does meanwhile; of a short text nothing is worth a thread."""
    meanwhile, others = threading.Event(), asyncio.get_running_loop()
    others.call_later(0.01, meanwhile.set)

    def tokenize() -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array([meanwhile.wait(patience(30.0))], np.int32)

    [went_on] = await beside_others(characters_of([{"content": "x" * LONG}, {"content": None}]), tokenize)
    assert went_on
    threads: list[int] = []

    def note() -> np.ndarray[Any, np.dtype[np.int32]]:
        threads.append(threading.get_ident())
        return np.zeros(1, np.int32)

    await beside_others(len("short"), note)
    assert threads == [threading.get_ident()]
