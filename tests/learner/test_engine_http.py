"""What an engine's answers, and silences, become."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from deadlines import patience

from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.engine_http import EngineAddress, call

ANSWERS = {
    "/ok": (200, b'{"success": true, "n": 1}'),
    "/text": (200, b"Cache flushed."),
    "/refused": (400, b'{"success": false, "message": "not now"}'),
    "/failed": (200, b'{"success": false, "message": "half done"}'),
    "/broken": (500, b"<html>oops</html>"),
}


ADMIN_KEY_REFUSED = "/newer"
"""A route of a later version, as older ones answer: the admin key opens control routes that they know."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.keys.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        status, body = ANSWERS.get(self.path, (404, b"not found"))
        if self.path == ADMIN_KEY_REFUSED and self.headers.get("Authorization") == "Bearer a":
            status = 401
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.keys = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server: ThreadingHTTPServer, **keys: str) -> EngineAddress:
    return EngineAddress(f"http://127.0.0.1:{server.server_port}", **keys)  # type: ignore[arg-type]


def test_answers(server: ThreadingHTTPServer) -> None:
    engine = address(server)
    assert call(engine, "POST", "/ok", {}, timeout_s=patience(5)) == {"success": True, "n": 1}
    assert call(engine, "POST", "/text", None, timeout_s=patience(5)) == {}
    assert call(engine, "POST", "/unknown", {}, timeout_s=patience(5)) is None


@pytest.mark.parametrize(("path", "reason"), [("/refused", "not now"), ("/failed", "half done"), ("/broken", "oops")])
def test_refusals_name_the_engine_and_its_reason(server: ThreadingHTTPServer, path: str, reason: str) -> None:
    engine = address(server)
    with pytest.raises(WeightSyncError, match=f"{engine.url} refused POST {path}: .*{reason}"):
        call(engine, "POST", path, {}, timeout_s=patience(5))


def test_each_route_gets_its_key(server: ThreadingHTTPServer) -> None:
    call(address(server, admin_key="a", api_key="b"), "POST", "/ok", {}, timeout_s=patience(5))
    call(address(server, admin_key="a", api_key="b"), "POST", "/ok", {}, timeout_s=patience(5), admin=False)
    call(address(server, api_key="b"), "POST", "/ok", {}, timeout_s=patience(5))
    call(address(server, admin_key="a"), "POST", "/ok", {}, timeout_s=patience(5), admin=False)
    assert server.keys == ["Bearer a", "Bearer b", "Bearer b", None]  # type: ignore[attr-defined]


def test_a_route_that_is_too_new_is_none_whatever_the_keys(server: ThreadingHTTPServer) -> None:
    engine = address(server, admin_key="a", api_key="b")
    assert call(engine, "POST", ADMIN_KEY_REFUSED, {}, timeout_s=patience(5)) is None
    assert call(address(server, admin_key="a"), "POST", ADMIN_KEY_REFUSED, {}, timeout_s=patience(5)) is None


def test_a_wrong_key_is_a_refusal(server: ThreadingHTTPServer) -> None:
    with pytest.raises(WeightSyncError, match="status 401"):
        call(address(server, admin_key="a", api_key="a"), "POST", ADMIN_KEY_REFUSED, {}, timeout_s=patience(5))


def test_silence_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = EngineAddress(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(WeightSyncError, match=rf"{engine.url} did not answer POST /x: TimeoutError.*is it alive\?"):
            call(engine, "POST", "/x", {}, timeout_s=0.2)
    with pytest.raises(WeightSyncError, match="did not answer GET /x: ConnectionRefusedError"):
        call(engine, "GET", "/x", None, timeout_s=patience(5))
