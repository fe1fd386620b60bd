"""A model folder with a chat template that shows what it was given, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small_runs import make_model, write_json
from transformers import AutoTokenizer

from opd_async.config.topology import PromptsSection
from opd_async.data.messages import ChatOptions
from opd_async.data.prompts import PromptSet, TeacherChoice, load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

TEMPLATE = (
    "{%- if tools is not none %}{{ tools | length }}{% for t in tools %}{{ t.name }}{% if 'd' in t %}{{ t.d | length }}"
    "{% endif %}{% endfor %}{% endif -%}{%- if deep is defined and deep %}e{% endif -%}"
    "{%- for m in messages -%}{{ m.role[0] }}{{ m.content or '' }}"
    # as Llama-3.1's: a key that is there counts, whatever it holds
    "{%- if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% if 'arguments' in c.function %}"
    "{% for k in c.function.arguments %}{{ k }}{% endfor %}{% endif %}{% endfor %}{% endif -%}{%- endfor -%}"
)
USER = {"role": "user", "content": "ab"}
SYSTEM = {"role": "system", "content": "hi"}
TOOL = {"role": "tool", "content": "5"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOOLS = [{"name": "g"}]


def with_template(folder: Path, template: Any) -> Path:
    make_model(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": template})
    return folder


def load(path: Any, folder: Path, chats: ChatOptions = ChatOptions(), **keys: Any) -> PromptSet:  # noqa: B008
    return load_prompts(PromptsSection(path=path, **keys), Tokenizer(folder), 64, TeacherChoice(), chats)


def refused(path: Any, folder: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(path, folder, **keys)
    return str(caught.value)


def expected(folder: Path, messages: list[dict[str, Any]], **names: Any) -> list[int]:
    """What transformers makes of the messages."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **names)
    return list(tokenizer.encode(text, add_special_tokens=False))


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
