"""Agents that speak OpenAI's API at an episode's endpoint: what they are answered, and which tokens a sample has."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from deadlines import patience
from fake_role import SPEED, until
from openai import AsyncOpenAI
from talking_engine import END, START
from talking_rollout import LONGEST, PROMPT, rollout

from opd_async.actors.rollout.session import Session
from opd_async.transport import messages as m

ASK: list[Any] = [{"role": "user", "content": "Add 2 and 3"}]
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def client_of(session: Session) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0)


async def an_agent_with_a_tool(session: Session, row: dict[str, Any]) -> float:
    messages = list(ASK)
    async with client_of(session) as client:
        assert [model.id async for model in client.models.list()] == ["student"]
        while True:
            answer = await client.chat.completions.create(model="any", messages=messages)
            said = answer.choices[0].message
            messages.append(said.model_dump())
            if answer.choices[0].finish_reason == "stop" and "5" in (said.content or ""):
                return 1.0
            messages.append({"role": "user", "content": "Go on"})


async def test_turns_that_extend_what_was_said_are_one_sample_and_keep_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(an_agent_with_a_tool, tmp_path, monkeypatch, "two", "and three", "is 5") as (running, engine):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("finished")) == ("stop", 1.0, 1)
        between = f"\n{START}user\nGo on{END}\n{START}assistant\n"
        assert running.text(sampled=True) == [f"two{END}", f"and three{END}", f"is 5{END}"]
        assert running.text(sampled=False) == [between, between]
        assert engine.read()[-1] == f"{PROMPT}two{END}{between}and three{END}{between}"
        assert (running.counted("begun"), running.counted("extended")) == (1, 2)


async def test_calls_of_tools_and_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            messages: list[Any] = list(ASK)
            first = await client.chat.completions.create(model="m", messages=messages, tools=[ADD])
            [choice] = first.choices
            assert choice.finish_reason == "tool_calls" and choice.message.content == "I add."
            assert choice.message.tool_calls is not None
            [call] = choice.message.tool_calls
            assert call.type == "function"
            assert (call.function.name, call.function.arguments) == ("add", '{"a": 2, "b": 3}')
            assert first.usage is not None and first.usage.completion_tokens == len(f"I add.\n{CALL}") + 1
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
            second = await client.chat.completions.create(model="m", messages=messages, tools=[ADD])
            assert (
                second.choices[0].message.content == "<tool_call>{broken" and not second.choices[0].message.tool_calls
            )
            messages += [second.choices[0].message, *ASK]
            third = await client.chat.completions.create(model="m", messages=messages, tools=[ADD], tool_choice="none")
            assert third.choices[0].message.content == CALL
        return 0.5

    answers = (f"I add.\n{CALL}", "<tool_call>{broken", CALL)
    async with rollout(episode, tmp_path, monkeypatch, *answers) as (running, _):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("finished")) == ("stop", 0.5, 1)
        assert running.text(sampled=True) == [answer + END for answer in answers]
        assert running.text(sampled=False)[1] == f"\n{START}tool\n5{END}\n{START}assistant\n"
        assert (running.counted("begun"), running.counted("extended")) == (1, 2)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_says_what_the_whole_answer_does(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"Caf\u00e9 \u2713, then\n{CALL}"

    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            texts, names, usage, ends = [""] * n, [""] * n, 0, 0
            stream = await client.chat.completions.create(
                model="m", messages=ASK, tools=[ADD], stream=True, n=n, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                usage = chunk.usage.completion_tokens if chunk.usage else usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    for call in choice.delta.tool_calls or []:
                        assert call.function is not None
                        names[choice.index] += f"{call.function.name} {call.function.arguments}"
                    ends += choice.finish_reason == "tool_calls"
            assert texts == ["Caf\u00e9 \u2713, then"] * n and names == ['add {"a": 2, "b": 3}'] * n
            assert ends == n and usage == n * (len(said.encode()) + 1)
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, *[said] * n) as (running, _):
        await running.lease()
        assert (await running.end()).reward == 1.0
        assert running.ended("finished") == 1


async def test_a_stop_ends_a_turn_and_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            answer = await client.chat.completions.create(model="m", messages=ASK, stop=["==", "!"])
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("2 + 3 ", "stop")
            messages: list[Any] = [*ASK, answer.choices[0].message, *ASK]
            answer = await client.chat.completions.create(model="m", messages=messages, max_completion_tokens=3)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc", "length")
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "2 + 3 == 5 and so on", "abcdef") as (running, _):
        await running.lease()
        await running.end()
        assert running.ended("finished") == 1
        assert running.text(sampled=True) == ["2 + 3 ==", "abc"]


async def test_another_history_is_another_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:

            async def ask(*messages: Any) -> str:
                answer = await client.chat.completions.create(model="m", messages=list(messages))
                return answer.choices[0].message.content or ""

            def says(text: str) -> dict[str, str]:
                return {"role": "assistant", "content": text}

            assert await ask(*ASK) == "one"
            assert await ask(*ASK, says("edited"), *ASK) == "two"
            assert await ask({"role": "system", "content": "Be brief"}, *ASK) == "three"
            assert await ask(*ASK, says("one"), *ASK) == "four"
            assert await ask(*ASK, says("edited"), *ASK, says("two"), *ASK) == "five"
            together = await asyncio.gather(*[ask(*ASK, says("one"), *ASK, says("four"), *ASK) for _ in range(2)])
            assert sorted(together) == ["seven", "six"]
        return 1.0

    answers = ("one", "two", "three", "four", "five", "six", "seven")
    async with rollout(episode, tmp_path, monkeypatch, *answers) as (running, engine):
        await running.lease()
        await running.end()
        assert running.ended("finished") == 1
        assert (running.counted("begun"), running.counted("extended")) == (4, 3)
        ends = await running.further_ends(3)
        assert [(end.finish, end.reward, end.episode, end.further) for end in ends] == [("stop", 1.0, 9, None)] * 3
        assert [end.grant for end in ends] == [7, 8, 9], "each has a lease"
        begun = [end.sample_id for end in ends]
        last = running.chunks[-1]
        assert last.further is not None and last.further.tolist() == begun and last.episode is None
        said = [running.text(True, sample_id) for sample_id in begun]
        assert running.text(True)[:2] == [f"one{END}", f"four{END}"] and len(running.text(True)) == 3
        assert said[:2] == [[f"two{END}", f"five{END}"], [f"three{END}"]] and len(said[2]) == 1
        assert sorted(running.text(True)[2:] + said[2]) == [f"seven{END}", f"six{END}"]
        edited = running.further[begun[0]][0]
        assert not edited.sampled and edited.context is not None, "what the agent has made of its history is given"
        done = {one.sample_id: one for one in running.dispatcher.of(m.LeaseDone)}
        assert set(done) == {9, *begun} and all(one.finish == "stop" for one in done.values())
        assert done[begun[1]].response_tokens - done[begun[1]].given_tokens == len("three") + 1
        assert engine.read()[1].startswith(f"{PROMPT}edited{END}\n{START}user")
        assert engine.read()[2].startswith(f"{START}system\nBe brief{END}")


async def test_other_choices_are_samples_that_were_given_what_the_first_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            first = await client.chat.completions.create(model="m", messages=ASK)
            messages: list[Any] = [*ASK, first.choices[0].message, *ASK]
            answer = await client.chat.completions.create(model="m", messages=messages, n=2)
            assert sorted(choice.message.content or "" for choice in answer.choices) == ["left", "right"]
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "first", "left", "right") as (running, _):
        await running.lease()
        await running.end()
        [end] = await running.further_ends(1)
        assert running.text(True)[0] == f"first{END}"
        assert running.text(False, end.sample_id) == [f"first{END}" + running.text(False)[0]]
        assert sorted([*running.text(True)[1:], *running.text(True, end.sample_id)]) == [f"left{END}", f"right{END}"]


async def test_a_launcher_that_leases_nothing_is_named_and_what_comes_late_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            await client.chat.completions.create(model="m", messages=ASK)
            running.dispatcher.leases = False
            with pytest.raises(openai.InternalServerError, match="launcher leased no further conversation") as error:
                await client.chat.completions.create(model="m", messages=ASK)
            assert error.value.status_code == 503
            running.dispatcher.leases = True
            answer = await client.chat.completions.create(model="m", messages=ASK)
            assert answer.choices[0].message.content == "two"
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "one", "two") as (running, _):
        await running.lease()
        await running.end()
        [end] = await running.further_ends(1)
        late = running.dispatcher.of(m.FurtherWanted)[0]
        await running.dispatcher.lease_further(late)
        await until(lambda: bool(running.dispatcher.of(m.FurtherUnused)), "it is given back")
        assert running.dispatcher.of(m.FurtherUnused) == [m.FurtherUnused(end.sample_id + 1, 1)]
        assert len(running.dispatcher.of(m.LeaseDone)) == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
    ({"messages": ASK, "temperature": 0.3}, "rollout.sampling.temperature"),
    ({"messages": ASK, "top_p": 0.5}, "top_p"),
    ({"messages": ASK, "n": 0}, "n must be"),
    ({"messages": ASK, "max_tokens": -1}, "max_tokens"),
    ({"messages": ASK, "stop": [""]}, "stop"),
    ({"messages": ASK, "stream": 1}, "stream"),
    ({"messages": ASK, "logit_bias": {"5": 100}}, "logit_bias"),
    ({"messages": ASK, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": ASK, "guided_json": {}}, "guided_json"),
    ({"messages": ASK, "tools": [{"type": "web"}]}, "tools"),
    ({"messages": ASK, "tool_choice": 3}, "tool_choice"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
]


async def test_what_is_refused_and_that_the_episode_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        headers = {"Authorization": f"Bearer {session.api_key}"}
        url = f"{session.base_url}/chat/completions"
        async with aiohttp.ClientSession() as http:
            for body, word in BAD:
                async with http.post(url, json=body, headers=headers) as answer:
                    told = (await answer.json())["error"]["message"]
                    assert answer.status == 400 and word in told, told
            for raw in (b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000):
                async with http.post(url, data=raw, headers=headers) as answer:
                    assert answer.status == 400, await answer.text()
            async with http.post(url, data=io.BytesIO(b" " * (9 << 20)), headers=headers) as answer:
                assert answer.status == 413
            for key in ("", "Bearer", "Bearer another", f"Basic {session.api_key}"):
                for ask in (
                    http.post(url, json={"messages": ASK}, headers={"Authorization": key}),
                    http.get(f"{session.base_url}/models", headers={"Authorization": key}),
                ):
                    async with ask as answer:
                        assert answer.status == 401
        async with client_of(session) as client:
            long: Any = [{"role": "user", "content": "x" * LONGEST}]
            with pytest.raises(openai.BadRequestError) as error:
                await client.chat.completions.create(model="m", messages=long)
            assert error.value.code == "context_length_exceeded"
            fine = await client.chat.completions.create(model="m", messages=ASK, temperature=1.0, n=1, seed=5)
            assert fine.choices[0].message.content == "5"
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "5") as (running, engine):
        await running.lease()
        end = await running.end()
        assert (end.reward, running.ended("finished"), len(engine.read())) == (1.0, 1, 1)
        assert (running.counted("refused"), running.counted("unauthorized")) == (len(BAD) + 6, 8)
        assert running.counted("full") == 1
        assert running.text(sampled=True) == [f"5{END}"] and running.text(sampled=False) == []


async def test_an_agent_that_was_refused_goes_on_with_its_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is too long; it says less behind the same answer, which is still the one that was sampled."""

    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            first = await client.chat.completions.create(model="m", messages=ASK)
            history = [*ASK, first.choices[0].message]
            long = {"role": "user", "content": "x" * LONGEST}
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="m", messages=[*history, long])
            assert refused.value.code == "context_length_exceeded"
            again = [*history, {"role": "user", "content": "Go on"}]
            second = await client.chat.completions.create(model="m", messages=again)
            assert second.choices[0].message.content == "three"
        raise KeyError("a bug of the agent's own")

    async with rollout(episode, tmp_path, monkeypatch, "two", "three") as (running, _):
        await running.lease()
        end = await running.end()
        assert running.text(sampled=True) == [f"two{END}", f"three{END}"]
        assert (running.counted("begun"), running.counted("extended"), running.counted("full")) == (1, 1, 1)
        assert (end.finish, running.ended("full"), running.ended("raised")) == ("failed", 0, 1), (
            "it did not end of that"
        )


async def test_a_conversation_that_is_full_ends_its_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        messages = list(ASK)
        async with client_of(session) as client:
            while True:
                answer = await client.chat.completions.create(model="m", messages=messages)
                messages += [answer.choices[0].message, {"role": "user", "content": "x" * 100}]

    async with rollout(episode, tmp_path, monkeypatch, *["y" * 100] * 9) as (running, _):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("full")) == ("length", None, 1)
        assert not running.role.counters.get("episodes_failed")


async def test_an_agent_that_leaves_in_mid_stream_leaves_what_was_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        async with client_of(session) as client:
            stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            await until(lambda: running.counted("left") == 1, "the server sees it")
            engine.release()
            engine.stalls = False
            answer = await client.chat.completions.create(model="m", messages=ASK)
            assert answer.choices[0].message.content == "again"
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "never ends", "again") as (running, engine):
        engine.stalls = True
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("finished")) == ("stop", 1.0, 1)
        assert running.text(sampled=True)[0] == "ne" and running.counted("begun") == 2


async def test_an_agent_that_never_answers_meets_the_deadline_and_its_key_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Session] = []

    async def episode(session: Session, row: dict[str, Any]) -> float:
        told.append(session)
        async with client_of(session) as client:
            await client.chat.completions.create(model="m", messages=ASK)
            await asyncio.Event().wait()
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "ok", deadline_s=SPEED * patience(0.7)) as (running, _):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("deadline")) == ("failed", None, 1)
        async with client_of(told[0]) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="m", messages=ASK)
        assert running.text(sampled=True) == [f"ok{END}"]


async def test_an_episode_that_ends_while_it_is_asked_cancels_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        client = client_of(session)
        asking = asyncio.create_task(client.chat.completions.create(model="m", messages=ASK))
        await until(lambda: any(body.get("stream") for body in engine.seen), "the turn")
        asking.add_done_callback(lambda task: task.exception())
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "never ends") as (running, engine):
        engine.stalls = True
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.counted("left")) == ("stop", 1.0, 1)
        engine.release()


@pytest.mark.parametrize("held", ["", "two", f"two{END}", f"two{END}\n{START}user\nGo on{END}\n{START}assistant\nand"])
async def test_a_second_attempt_replays_what_is_held(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = f"two{END}\n{START}user\nGo on{END}\n{START}assistant\nis 5{END}"
    held = held.replace("and", "is")
    answers = {"": ("two", "is 5"), "two": ("", "is 5"), f"two{END}": ("is 5",)}.get(held, (" 5",))
    async with rollout(an_agent_with_a_tool, tmp_path, monkeypatch, *answers) as (running, _):
        await running.lease(running.tokenizer.encode(held).ids if held else [])
        end = await running.end()
        assert (end.finish, end.reward) == ("stop", 1.0)
        assert end.end == len(running.tokenizer.encode(whole).ids)
        assert running.dispatcher.of(m.LeaseDone)[0].given_tokens == len(
            running.tokenizer.encode(f"\n{START}user\nGo on{END}\n{START}assistant\n").ids
        )


async def test_a_second_attempt_whose_agent_asks_otherwise_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rollout(an_agent_with_a_tool, tmp_path, monkeypatch, "two") as (running, _):
        held = running.tokenizer.encode(f"two{END}\n{START}user\nStop it{END}").ids
        await running.lease(held)
        end = await running.end()
        assert (end.finish, end.reward, running.ended("diverged")) == ("failed", None, 1)
