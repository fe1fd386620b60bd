"""A hub on this machine: serves folders as huggingface_hub asks for them. Only what the tests need of its API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GATED = "owner/gated"
COMMIT = "c" * 40


def _handler(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Models are the folders `owner/name` below `folder`, data sets those below `folder / "datasets"`.

        Each has one revision, `main`.
        """

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            parts = path.strip("/").split("/")
            api = parts[0] == "api"
            kind = "datasets/" if "datasets" in parts[:2] else ""
            owner, own, *rest = parts[api + (api or kind != "") :]
            name, revision, rest = f"{kind}{owner}/{own}", rest[1] if len(rest) > 1 else "main", rest[2:]
            if name.removeprefix(kind) == GATED:
                self._refuse(403, "GatedRepo")
            elif not (folder / name).is_dir():
                self._refuse(401, "RepoNotFound")
            elif revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            elif api:
                self._files(folder / name, f"{owner}/{own}", tree="/tree/" in path)
            else:
                self._file(folder / name / "/".join(rest), body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _files(self, model: Path, name: str, tree: bool) -> None:
            files = sorted(path for path in model.iterdir() if path.is_file())
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            whole = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            text = json.dumps(listed if tree else whole).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _file(self, file: Path, body: bool) -> None:
            if not file.is_file():
                self._refuse(404, "EntryNotFound")
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@contextmanager
def hub_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the models below `folder` on loopback; yields the address, and the paths that were asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, asked))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
