"""Where one stream stands: which tokens of an event are new, and whether all of them carry the right version.

SGLang streams in three ways. With `--incremental-streaming-output` an event has the tokens since the last one; without
it, all tokens so far, and a slow reader gets only the newest event; and the last event of a request that was aborted
while it waited repeats a token that was sent before. `meta_info.completion_tokens`, the number of tokens so far, tells
them apart, so that no token is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from opd_async.errors import EngineError


class StreamCursor:
    """Follows the events of one stream: how many tokens and logprobs of it were taken."""

    def __init__(self) -> None:
        self.received = 0
        """Tokens so far."""
        self._spans: list[list[Any]] = []
        """[version, end]: the weight versions of the tokens so far."""

    def parts(self, events: Sequence[Any]) -> Iterator[Any]:
        """The new tokens of events that arrived together; successive events of one version are joined into one.

        Raises as `new_part` does, after what came before.
        """
        joined: Any = None
        for event in events:
            try:
                part = self.new_part(event)
            except EngineError:
                if joined is not None:
                    yield joined
                raise
            if joined is not None and _follows(joined, part):
                _append(joined, part)
                continue
            if joined is not None:
                yield joined
            joined = part
        if joined is not None:
            yield joined

    def new_part(self, event: Any) -> Any:
        """The event with its new tokens only. What it cannot read is passed on: `parse_delta` says what is wrong.

        Raises `EngineError` when tokens are missing before this event, and at the end of the stream when the server's
        own account of the versions (`weight_versions`) differs from what the events said.
        """
        if not isinstance(event, dict) or "error" in event:
            return event
        meta, ids = event.get("meta_info"), event.get("output_ids")
        if not isinstance(meta, dict) or not isinstance(ids, list):
            return event
        total = meta.get("completion_tokens")
        if type(total) is not int or total < 0:
            raise EngineError("completion_tokens: missing")
        new = total - self.received
        if new < 0 or (new > 0 and len(ids) not in (new, total)):
            raise EngineError(
                f"completion_tokens: {total} after {self.received}, but the event has {len(ids)} tokens: some are lost"
            )
        entries = meta.get("output_token_logprobs")
        if new == 0 or (isinstance(entries, list) and len(entries) == len(ids)):
            part = entries[len(ids) - new :] if new and isinstance(entries, list) else []
            meta = {**meta, "output_token_logprobs": part}
        self._advance(total, meta)
        return {**event, "output_ids": ids[len(ids) - new :], "meta_info": meta}

    def _advance(self, total: int, meta: dict[str, Any]) -> None:
        version = str(meta.get("weight_version"))
        if total > self.received:
            if self._spans and self._spans[-1][0] == version:
                self._spans[-1][1] = total
            else:
                self._spans.append([version, total])
        self.received = total
        account = meta.get("weight_versions")
        if isinstance(account, list) and total:
            try:
                theirs = [[str(span["version"]), span["end"]] for span in account]
            except (TypeError, LookupError):
                raise EngineError("weight_versions: not a list of spans") from None
            if theirs != self._spans:
                raise EngineError(f"weight_versions: {theirs}, but the events said {self._spans}")


def _follows(joined: Any, part: Any) -> bool:
    """Whether both are events with tokens of one version, and the stream had not ended with the first."""
    return (
        _is_plain(joined)
        and _is_plain(part)
        and (
            joined["meta_info"].get("finish_reason") is None
            and joined["meta_info"].get("weight_version") == part["meta_info"].get("weight_version")
        )
    )


def _is_plain(part: Any) -> bool:
    if not isinstance(part, dict) or "error" in part:
        return False
    ids, meta = part.get("output_ids"), part.get("meta_info")
    entries = meta.get("output_token_logprobs") if isinstance(meta, dict) else None
    return isinstance(ids, list) and isinstance(entries, list) and len(ids) == len(entries) > 0


def _append(joined: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the tokens of `part`, and what it says of the stream so far."""
    ids, entries = joined["output_ids"], joined["meta_info"]["output_token_logprobs"]
    ids += part["output_ids"]
    entries += part["meta_info"]["output_token_logprobs"]
    joined |= part | {"output_ids": ids, "meta_info": part["meta_info"] | {"output_token_logprobs": entries}}
