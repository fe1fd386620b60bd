"""Errors that the embedded engine answers with, each carrying its HTTP status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

MAX_MESSAGE = 1000
"""Characters: messages repeat what was sent, which may be long."""


class ApiError(Exception):
    """A request that cannot be served; `status` is the HTTP status, `str(error)` the message for the user."""

    def __init__(self, message: str, status: int = HTTPStatus.BAD_REQUEST, *, bare: bool = False) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...")
        self.status = int(status)
        self._bare = bare

    def payload(self) -> dict[str, Any]:
        """JSON body. A field that the schema gate refuses is a bare string, as SGLang writes it."""
        if self._bare:
            return {"error": str(self)}
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error"
        return {"error": {"message": str(self), "type": kind, "code": self.status, "retryable": False}}


class WeightError(ApiError):
    """A weight operation that failed; its body is `{"success": false, "message": ...}`."""

    def payload(self) -> dict[str, Any]:
        return {"success": False, "message": str(self)}
