"""Decide whether a response is right."""

from __future__ import annotations

import re

from opd_async.errors import InputError


class AnswerChecker:
    """Compare an answer with its label: the answer is the first group of a regular expression, found in the response.

    Raises `InputError` if the pattern is not a regular expression or has no group.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise InputError(f"answer pattern {pattern!r} is not a regular expression: {error}") from None
        if self._pattern.groups == 0:
            raise InputError(f"answer pattern {pattern!r} has no group; put the answer in parentheses, as in ^(.*)$")

    def correct(self, response_text: str, label: str, finished: bool) -> bool:
        """Return True if the response ended by itself (`finished`) and its answer equals a label that is not empty."""
        if not finished or not label:
            return False
        match = self._pattern.search(response_text)
        return match is not None and match.group(1) == label
