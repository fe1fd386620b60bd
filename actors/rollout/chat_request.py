"""What an agent asks of an episode's endpoint: the body of a chat completion, checked. Pure.

What would change how the student samples is refused, since a sampled token would then be no sample of the student;
what changes nothing is accepted and has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_async.errors import OpdError

IGNORED = frozenset(
    {"model", "user", "metadata", "store", "seed", "service_tier", "prompt_cache_key", "safety_identifier"}
    | {"parallel_tool_calls", "logit_bias", "response_format", "presence_penalty", "frequency_penalty", "logprobs"}
)
"""Keys without effect; of the last five only values that ask for nothing are accepted."""
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
}
READ = frozenset({"messages", "tools", "tool_choice", "stream", "stream_options", "n", "stop", "temperature", "top_p"})
LIMITS = ("max_completion_tokens", "max_tokens")
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHOICES = 16
MAX_STOPS = 16


class RequestError(OpdError):
    """A request that cannot be answered; `code` is what clients of OpenAI's API look at."""

    def __init__(self, text: str, code: str = "invalid_value") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One checked request."""

    messages: tuple[Mapping[str, Any], ...]
    """As the chat template reads them."""
    tools: tuple[Any, ...] | None
    calls: bool
    """Whether calls of tools are looked for in the answer."""
    stream: bool
    usage: bool
    """Whether a stream ends with the count of its tokens."""
    n: int
    stop: tuple[str, ...]
    max_tokens: int | None

    def record(self) -> tuple[str, ...]:
        """Each message in a form in which equal ones are equal, whoever has written them down."""
        return tuple(record_of(message) for message in self.messages)


def record_of(message: Mapping[str, Any]) -> str:
    """A message as text that is the same for the same message: without keys that say nothing, and ids of calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    kept = {key: message[key] for key in ("role", "tool_call_id", "name") if message.get(key)}
    return json.dumps(kept | {"content": message.get("content") or "", "calls": calls}, sort_keys=True)


def parse_request(body: object, temperatures: Sequence[float]) -> ChatRequest:
    """Check a body; `temperatures` are those that may be asked for. Raises `RequestError`."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    asked = {key: value for key, value in body.items() if value is not None}
    for key, value in asked.items():
        if key not in READ | IGNORED and key not in LIMITS:
            raise RequestError(f"{key}: this endpoint cannot do it; leave it out", "unsupported_parameter")
        if key in _NOTHING and value not in _NOTHING[key]:
            raise RequestError(f"{key}: would change what the student samples; leave it out", "unsupported_value")
    _require_sampling(asked, temperatures)
    options = asked.get("stream_options", {})
    tools = _tools(asked.get("tools"))
    return ChatRequest(
        messages=_messages(asked.get("messages")),
        tools=tools,
        calls=_may_call(asked.get("tool_choice", "auto")) and tools is not None,
        stream=_flag(asked.get("stream", False), "stream"),
        usage=isinstance(options, dict) and options.get("include_usage") is True,
        n=_count(asked.get("n", 1), "n", MAX_CHOICES),
        stop=_stop(asked.get("stop", [])),
        max_tokens=next((_count(asked[key], key, None) for key in LIMITS if key in asked), None),
    )


def _require_sampling(asked: Mapping[str, Any], temperatures: Sequence[float]) -> None:
    temperature = asked.get("temperature", temperatures[0])
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature not in temperatures:
        raise RequestError(
            f"temperature: the run samples with {temperatures[0]:g} (rollout.sampling.temperature); leave it out, or "
            "send that",
            "unsupported_value",
        )
    if asked.get("top_p", 1) != 1:
        raise RequestError("top_p: the student samples from all tokens; leave it out", "unsupported_value")


def _flag(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{key} must be true or false")
    return value


def _count(value: object, key: str, most: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise RequestError(f"{key} must be an integer of at least 1" + ("" if most is None else f" and at most {most}"))
    return value


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError("stop must be a text, or a list of texts, none of them empty")
    if len(texts) > MAX_STOPS:
        raise RequestError(f"stop: {len(texts)} texts; send {MAX_STOPS} at most")
    return tuple(texts)


def _tools(value: object) -> tuple[Any, ...] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RequestError("tools must be a list")
    for tool in value:
        kind, function = (tool.get("type"), tool.get("function")) if isinstance(tool, dict) else (None, None)
        if kind != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError('tools must be objects with "type": "function" and a named "function"')
    return tuple(value)


def _may_call(choice: object) -> bool:
    """Whether a choice lets the student call. One that would force a call is a wish: no token is ever forced."""
    if choice not in ("auto", "none", "required") and not isinstance(choice, dict):
        raise RequestError("tool_choice must be auto, none, required, or name a tool")
    return choice != "none"


def _messages(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list with a message in it")
    return tuple(_message(one, index) for index, one in enumerate(value))


def _message(value: object, index: int) -> Mapping[str, Any]:
    at = f"messages[{index}]"
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise RequestError(f"{at} must be an object whose role is one of {', '.join(ROLES)}")
    kept = {key: item for key, item in value.items() if item is not None}
    kept["content"] = _content(value.get("content"), at)
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"], at)
    return kept


def _content(value: object, at: str) -> str:
    """Text, or parts that are text, as one."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RequestError(f"{at}.content must be text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{at}.content has a part that is no text; the student reads text alone")
    return "".join(str(text) for text in texts)


def _calls(value: object, at: str) -> list[dict[str, Any]]:
    """Earlier calls as templates write them: with arguments that are an object, not its text."""
    calls = []
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise RequestError(f"{at}.tool_calls must be a list of calls")
    for call in value:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{at}.tool_calls must be a list of calls with a named function")
        arguments = function.get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = arguments
        made = {"name": function["name"], "arguments": parsed}
        calls.append({"type": "function", "id": str(call.get("id", "")), "function": made})
    return calls
