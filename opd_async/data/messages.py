"""Chat prompts as data sets write them, to the messages that a chat template gets.

list of messages, or the same as JSON text -> parts joined, null keys left out
a text with data.as_chat                   -> one message of the user
a chat without a system message of its own -> data.system_prompt in front
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd_async.config.inputs import DataSection
from opd_async.data.rows import RowError, from_json

Message = dict[str, Any]
_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|tool_calls)'\s*:.*\]\s*", re.DOTALL)
"""Messages as Python prints them, which is what `str` makes of a list."""
_BROKEN = re.compile(r"\s*\[\s*\{\s*\"(role|content|tool_calls)\"\s*:.*\}\s*\]\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the section `data` says about chats."""

    as_chat: bool = False
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: DataSection) -> ChatOptions:
        """Those of a topology."""
        return cls(section.as_chat, section.system_prompt, section.chat_template_kwargs)


NO_OPTIONS = ChatOptions()


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of a prompt, and the tools that its template is told of."""

    messages: list[Message]
    tools: list[Any] | None
    of_text: str | None = None
    """The plain text that was made a message of."""


def read_chat(prompt: Any, tools: Any, options: ChatOptions) -> Chat | None:
    """Return the chat that a prompt is; None for a plain text.

    `prompt` is a text or a list that is not empty. Raises `RowError` for messages that are of no use.
    """
    if isinstance(prompt, str):
        prompt = _chat_in_text(prompt)
    own_tools, text = _tools(tools), None
    if isinstance(prompt, str):
        if not options.as_chat:
            if own_tools is not None:
                raise RowError("tools, but the prompt is a plain text; write chat messages, or set data.as_chat")
            return None
        text, prompt = prompt, [{"role": "user", "content": prompt}]
    messages = [_message(message) for message in prompt]
    if messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's, an answer and no prompt; leave it out")
    if options.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": options.system_prompt})
    return Chat(messages, own_tools, text)


def read_answer(value: Any) -> Any:
    """Return the text of a completion that is written as one message of the assistant; other values as they are."""
    messages = from_json(value)
    if isinstance(value, str) and not _is_chat(messages):
        return value
    if not isinstance(messages, list) or not messages:
        return value
    message = _message(messages[0])
    if len(messages) != 1 or message["role"] != "assistant" or "tool_calls" in message:
        raise RowError("the completion is not one message of the assistant without tool calls; write the text itself")
    return message["content"]


def _chat_in_text(text: str) -> Any:
    """Return the chat that a text holds as JSON; any other text as it is."""
    found = from_json(text)
    if _is_chat(found):
        return found
    if found is text and _PYTHON.fullmatch(text):
        raise RowError("the prompt is chat messages as Python prints them; write a list, or JSON (json.dumps)")
    if found is text and _BROKEN.fullmatch(text):
        raise RowError("the prompt is chat messages as text that is no valid JSON; write a list, or JSON (json.dumps)")
    return text


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _message(message: Any) -> Message:
    """Return one message without null keys. A content that is null stays beside tool calls: templates ask for it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError("a chat message needs a role and a content, both text")
    found: Message = {key: value for key, value in message.items() if value is not None}
    if calls := found.get("tool_calls"):
        if not isinstance(calls, list):
            raise RowError("the tool_calls of a message are no list")
        found["tool_calls"] = [_call(call) for call in calls]
    else:
        found.pop("tool_calls", None)
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = "".join(_part(part) for part in content)
    elif content is None and "tool_calls" in found:
        if "content" in message:
            found["content"] = None
    elif not isinstance(content, str):
        raise RowError("a chat message needs a role and a content, both text")
    return found


def _call(call: Any) -> Message:
    """Leave null keys out of a tool call and of its function; what the arguments hold is the tool's own business."""
    if not isinstance(call, dict):
        raise RowError("a tool call is no object")
    kept = {key: value for key, value in call.items() if value is not None}
    if isinstance(kept.get("function"), dict):
        kept["function"] = {key: value for key, value in kept["function"].items() if value is not None}
    return kept


def _part(part: Any) -> str:
    """Return the text of a part. Templates that read parts write their texts one after the other, so this does too."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise RowError(f"a part of a chat message is {kind or 'no text'}, and the models here read text only")


def _tools(value: Any) -> list[Any] | None:
    """Return the tools of a row; None where there are none. Each may be JSON text, and so may all of them."""
    tools = from_json(value)
    if tools is None or tools == [] or tools == "":
        return None
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("the tools are not a list of objects; write what the chat template wants, or set tools_key")
    return tools
