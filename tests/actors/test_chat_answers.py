"""What a turn is told as: calls that are found or not, and streams that add up to the whole answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opd_async.actors.rollout.chat_answer import TextStream, choice_of
from opd_async.actors.rollout.chat_request import ChatRequest, parse_request, record_of
from opd_async.actors.rollout.session import Turn
from opd_async.actors.rollout.tool_calls import ToolCall, parse_calls

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add"}}]
PARTS = st.sampled_from(
    [CALL, "<tool_call>", "</tool_call>", "<tool", "{}", " ", "\n", "STOP", "ST", "caf\u00e9 \U0001f600", "a"]
)


def request(tools: bool, *stop: str) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "x"}], "stop": list(stop), "tools": TOOLS if tools else []}
    return parse_request(body, (1.0,))


def test_calls_and_what_stands_before_them() -> None:
    add = ToolCall("add", {"a": 1})
    assert parse_calls(f"First.\n{CALL}\n{CALL}\n") == ("First.", (add, add))
    assert parse_calls(CALL.removesuffix("\n</tool_call>")) == ("", (add,))
    assert parse_calls('<tool_call>{"name": "now"}</tool_call>') == ("", (ToolCall("now", {}),))


def test_what_is_no_call_is_content() -> None:
    for inside in ("", "{", "[1]", '{"name": 3}', '{"name": ""}', '{"name": "a", "arguments": "b"}', "[" * 100_000):
        text = f"So: <tool_call>{inside}</tool_call>"
        assert parse_calls(text) == (text, ())
    for text in ("", "plain", f"{CALL} and then", f"{CALL}<tool_call>broken"):
        assert parse_calls(text) == (text, ())


@given(st.lists(PARTS, max_size=8), st.booleans(), st.booleans())
def test_a_stream_adds_up_to_the_answer(parts: list[str], tools: bool, stops: bool) -> None:
    text = "".join(parts)
    asked = request(tools, *(["STOP"] if stops else []))
    choice = choice_of(Turn(text, (), "stop"), asked, 0, 0)
    stream = TextStream(asked)
    raw = text.encode()
    said = [stream.more(raw[:end].decode(errors="replace")) for end in range(len(raw) + 1)]
    assert "".join(said) + stream.rest(choice) == choice.content
    assert not stops or "STOP" not in choice.content


def test_records_are_alike_whoever_wrote_them() -> None:
    answer = choice_of(Turn(CALL, (), "stop"), request(True), 0, 0)
    [sent] = parse_request({"messages": [answer.message() | {"refusal": None, "audio": None}]}, (1.0,)).messages
    assert record_of(sent) == record_of(answer.for_record())
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    [joined] = parse_request({"messages": [parts]}, (1.0,)).messages
    assert record_of(joined) == record_of({"role": "user", "content": "ab", "name": None})
