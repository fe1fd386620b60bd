"""Decide which key opens which route, by SGLang's rules. Pure."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

OPEN_PREFIXES = ("/health", "/ready", "/metrics")
CONTROL_ROUTES = frozenset(
    {
        "/abort_request",
        "/pause_generation",
        "/continue_generation",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weights_from_distributed",
        "/update_weights_from_disk",
        "/update_weight_version",
        "/weights_checker",
        "/flush_cache",
    }
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The server's keys; None switches a key off."""

    api: str | None
    admin: str | None

    def allows(self, path: str, authorization: str | None) -> bool:
        """True when a request for `path` with this Authorization header may pass.

        Control routes take the admin key if there is one, else the API key; all others take the API key only.
        """
        if path.startswith(OPEN_PREFIXES):
            return True
        needed = self.api
        if path in CONTROL_ROUTES and self.admin is not None:
            needed = self.admin
        if needed is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        return scheme == "Bearer" and hmac.compare_digest(given.encode(), needed.encode())
