"""A rollout actor's server for agents that speak OpenAI's API: chat completions of the student, for its own episodes.

    agent -> POST /v1/chat/completions (key of an episode) -> conversation -> turn of the student -> agent

    loop      waits for                     unblocked by
    server    a connection                  an agent
    request   a turn of the student         the engines; the agent leaving; the end of the episode

It listens on the loopback address alone. On cancel: connections close, requests under way are cancelled.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import orjson
from aiohttp import web

from opd_async.actors.rollout import chat_answer
from opd_async.actors.rollout.chat_answer import Choice, Completion, TextStream, error_body
from opd_async.actors.rollout.chat_request import ChatRequest, RequestError, parse_request
from opd_async.actors.rollout.conversations import Conversation, Conversations
from opd_async.actors.rollout.episode_generation import DivergedError
from opd_async.actors.rollout.samples import EpisodeSamples
from opd_async.actors.rollout.session import ResponseFullError
from opd_async.errors import DeadlineError, InputError
from opd_async.role import Role

HOST = "127.0.0.1"
MAX_BODY_BYTES = 8 << 20
START_DEADLINE_S = 30.0
Handled = web.StreamResponse


class _Episode:
    """One episode that can be asked."""

    def __init__(self, conversations: Conversations, temperatures: tuple[float, ...]) -> None:
        self.conversations = conversations
        self.temperatures = temperatures
        self.requests: set[asyncio.Task[object]] = set()


class Endpoint:
    """The server of one rollout actor."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._temperature = role.plan.topology.rollout.sampling.temperature
        self._episodes: dict[str, _Episode] = {}
        self._listens = asyncio.Event()
        self.url = ""

    async def serve(self) -> None:
        """Listen until cancelled."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        # handler_cancellation: an agent that leaves cancels its turn
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, 0).start()
            self.url = f"http://{HOST}:{runner.addresses[0][1]}/v1"
            self._listens.set()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def open(self, samples: EpisodeSamples, temperature: float) -> AsyncIterator[Conversations]:
        """Answer an episode's agent as long as the block lasts; its first session learns where and by which key.

        Requests under way at its end are cancelled. On cancel: the same.
        """
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._listens.wait()
        except TimeoutError:
            raise DeadlineError(f"rollout.endpoint: no server within {START_DEADLINE_S:.0f} s") from None
        key = secrets.token_urlsafe(32)
        conversations = Conversations(samples, self._count)
        episode = self._episodes[key] = _Episode(conversations, (self._temperature, temperature))
        samples.first.base_url, samples.first.api_key = self.url, key
        try:
            yield conversations
        finally:
            del self._episodes[key]
            for request in episode.requests:
                request.cancel()
            if episode.requests:
                await asyncio.wait(episode.requests)

    def _count(self, result: str) -> None:
        self._role.metrics["opd_rollout_chat_requests_total"].labels(result).inc()

    def _episode_of(self, http: web.Request) -> _Episode | None:
        """Whose key a request shows."""
        scheme, _, key = http.headers.get("Authorization", "").partition(" ")
        episode = self._episodes.get(key.strip()) if scheme.lower() == "bearer" else None
        if episode is None:
            self._count("unauthorized")
        return episode

    async def _models(self, http: web.Request) -> Handled:
        if self._episode_of(http) is None:
            return _stranger()
        return web.json_response(chat_answer.models())

    async def _completions(self, http: web.Request) -> Handled:
        episode = self._episode_of(http)
        if episode is None:
            return _stranger()
        task = asyncio.current_task()
        assert task is not None
        episode.requests.add(task)
        try:
            return await self._answered(http, episode)
        except ConnectionResetError:
            self._count("left")
            return web.Response()  # nobody reads it
        except asyncio.CancelledError:
            self._count("left")
            raise
        finally:
            episode.requests.discard(task)

    async def _answered(self, http: web.Request, episode: _Episode) -> Handled:
        try:
            request = parse_request(await _body(http), episode.temperatures)
            held = await episode.conversations.begin(request)
            try:
                return await _Answer(http, request, held, episode.conversations).made()
            finally:
                episode.conversations.release(held)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body is larger than {MAX_BODY_BYTES} bytes"
            return self._refused(text, "too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except RequestError as error:
            return self._refused(str(error), error.code)
        except ResponseFullError as error:
            return self._refused(str(error), "context_length_exceeded", counted="full")
        except DeadlineError as error:
            return self._refused(str(error), "unavailable", HTTPStatus.SERVICE_UNAVAILABLE)
        except (InputError, DivergedError, ValueError) as error:
            return self._refused(str(error), "invalid_value")

    def _refused(
        self, text: str, code: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, counted: str = "refused"
    ) -> web.Response:
        self._count(counted)
        return web.json_response(error_body(text, code), status=status)


def _stranger() -> web.Response:
    body = error_body("no episode that is under way has this key", "invalid_api_key")
    return web.json_response(body, status=HTTPStatus.UNAUTHORIZED)


async def _body(http: web.Request) -> object:
    try:
        found: object = orjson.loads(await http.read())
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    return found


class _Answer:
    """One request while the student answers it."""

    def __init__(
        self, http: web.Request, request: ChatRequest, held: list[Conversation], conversations: Conversations
    ) -> None:
        self._http, self._request = http, request
        self._held, self._conversations = held, conversations
        self._completion = Completion()

    async def made(self) -> Handled:
        """All choices, each in a task of its own. On cancel, or where one fails: the others are cancelled."""
        if self._request.stream and all(one.session.room for one in self._held):
            return await self._streamed()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._turn(index)) for index in range(len(self._held))]
        except* (ResponseFullError, DivergedError) as errors:
            raise errors.exceptions[0] from None
        return web.json_response(self._completion.whole([task.result() for task in tasks]))

    async def _turn(self, index: int) -> Choice:
        return await self._conversations.turn(self._held[index], self._request, index)

    async def _streamed(self) -> Handled:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await out.prepare(self._http)
        news = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._turn(index)) for index in range(len(self._held))]
                for one, task in zip(self._held, tasks, strict=True):
                    one.session.listen(news.set)
                    task.add_done_callback(lambda _: news.set())
                await self._write(out, tasks, news)
        except* ConnectionResetError:
            raise ConnectionResetError from None
        choices = [task.result() for task in tasks]
        if self._request.usage:
            await out.write(self._completion.usage(choices))
        await out.write(chat_answer.DONE)
        return out

    async def _write(self, out: web.StreamResponse, tasks: list[asyncio.Task[Choice]], news: asyncio.Event) -> None:
        streams = [TextStream(self._request) for _ in tasks]
        for index in range(len(tasks)):
            await out.write(self._completion.chunk(index, {"role": "assistant", "content": ""}))
        left = set(range(len(tasks)))
        while left:
            await news.wait()
            news.clear()
            for index in sorted(left):
                if tasks[index].done():
                    left.discard(index)
                    choice = tasks[index].result()
                    await out.write(self._completion.last(choice, streams[index].rest(choice)))
                elif new := streams[index].more(self._held[index].session.said):
                    await out.write(self._completion.chunk(index, {"content": new}))
