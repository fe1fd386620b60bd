"""What an agent is answered: turns of the student as chat completions, whole or streamed. Pure."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_async.actors.rollout.chat_request import ChatRequest
from opd_async.actors.rollout.session import Turn
from opd_async.actors.rollout.tool_calls import OPENS, ToolCall, parse_calls

MODEL = "student"
DONE = b"data: [DONE]\n\n"
_UNFINISHED = "\ufffd"
"""What bytes decode to that begin a character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A turn of the student as a message of its assistant."""

    index: int
    content: str
    calls: tuple[tuple[str, ToolCall], ...]
    """Each with the id that the agent will name it by."""
    finish: str
    read: int
    """Tokens that it was generated behind."""
    made: int

    def message(self) -> dict[str, Any]:
        """In the form of OpenAI's API."""
        content = self.content if self.content or not self.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.calls:
            message["tool_calls"] = [_call(name, call) for name, call in self.calls]
        return message

    def for_record(self) -> dict[str, Any]:
        """As a request that has it in its history brings it."""
        calls = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for _, call in self.calls]
        return {"role": "assistant", "content": self.content} | ({"tool_calls": calls} if calls else {})


def _call(name: str, call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def choice_of(turn: Turn, request: ChatRequest, index: int, read: int) -> Choice:
    """What a turn says: up to a text of `stop`, and without the calls in it."""
    text = turn.text[: _stops_at(turn.text, request.stop)]
    content, calls = parse_calls(text) if request.calls else (text, ())
    named = tuple((f"call_{uuid.uuid4().hex[:24]}", call) for call in calls)
    finish = "tool_calls" if calls else turn.finish
    return Choice(index=index, content=content, calls=named, finish=finish, read=read, made=len(turn.token_ids))


def _stops_at(text: str, stops: Sequence[str]) -> int:
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))


def _held_back(text: str, marks: Sequence[str]) -> int:
    """Where the end of a text begins that may be the beginning of one of `marks`."""
    longest = max(map(len, marks), default=0)
    for at in range(max(len(text) - longest, 0), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at
    return len(text)


@dataclass(slots=True)
class TextStream:
    """The content of a turn as it comes: nothing is sent that might be no content."""

    request: ChatRequest
    sent: int = 0
    """Characters."""

    def more(self, text: str) -> str:
        """The new content of a turn that has said `text` so far."""
        marks = [*self.request.stop, *([OPENS] if self.request.calls else [])]
        safe = text.rstrip(_UNFINISHED)
        safe = safe[: _stops_at(safe, marks)]
        safe = safe[: _held_back(safe, marks)]
        if self.request.calls:  # what stands before a call ends without white space
            safe = safe.rstrip()
        return self._up_to(safe)

    def rest(self, choice: Choice) -> str:
        """What is left of the content of a turn that has ended."""
        return self._up_to(choice.content)

    def _up_to(self, text: str) -> str:
        new, self.sent = text[self.sent :], max(self.sent, len(text))
        return new


def _usage(choices: Sequence[Choice]) -> dict[str, int]:
    read, made = choices[0].read, sum(choice.made for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


@dataclass(frozen=True, slots=True)
class Completion:
    """The frame around the choices of one answer."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _framed(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": MODEL, "choices": choices} | more

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        rows = [
            {"index": one.index, "message": one.message(), "finish_reason": one.finish, "logprobs": None}
            for one in choices
        ]
        return self._framed("chat.completion", rows, usage=_usage(choices))

    def chunk(self, index: int, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        """An event with a part of a choice."""
        row = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event(self._framed("chat.completion.chunk", [row]))

    def last(self, choice: Choice, rest: str) -> bytes:
        """The events that end a choice: the rest of its content, its calls, and how it ended."""
        parts = [self.chunk(choice.index, {"content": rest})] if rest else []
        for at, (name, call) in enumerate(choice.calls):
            parts.append(self.chunk(choice.index, {"tool_calls": [{"index": at} | _call(name, call)]}))
        return b"".join([*parts, self.chunk(choice.index, {}, choice.finish)])

    def usage(self, choices: Sequence[Choice]) -> bytes:
        """The event behind the last choice of a stream that was asked for it."""
        return event(self._framed("chat.completion.chunk", [], usage=_usage(choices)))


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def error_body(text: str, code: str) -> dict[str, Any]:
    """What clients of OpenAI's API read of an error."""
    return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": code}}


def models() -> dict[str, Any]:
    """The body of /v1/models."""
    return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "opd_async"}]}
