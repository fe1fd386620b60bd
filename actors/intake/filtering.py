"""Which finished groups are trained: a function of the user's (`schedule.filter`), asked once for each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

from opd_async.hooks import HookError, add_working_directory, blame, load_hook

KEY = "schedule.filter"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """All responses to one prompt, as many as `rollout.group_size`; of an episode that of its first conversation."""

    sample_ids: tuple[int, ...]
    rewards: tuple[float | None, ...]
    """None where a response has no reward."""
    lengths: tuple[int, ...]
    """Tokens of each response."""


class Finished(Protocol):
    """What the filter must know of a response."""

    @property
    def sample_id(self) -> int:
        """Its number; groups are numbered one after the other."""

    @property
    def reward(self) -> float | None:
        """What it earned."""

    @property
    def end(self) -> int:
        """Its length in tokens."""

    @property
    def episode(self) -> int | None:
        """Of a further conversation of an episode: the response that is its first."""


_Taken = TypeVar("_Taken", bound=Finished)


class GroupFilter:
    """The user's function over the groups of a step; without one everything is trained."""

    def __init__(self, path: str | None, group_size: int) -> None:
        """Load `module:name`; raises `InputError` if that cannot be done."""
        self._path = path
        self._group_size = group_size
        self._keep: Callable[[FinishedGroup], bool] | None = None
        if path is not None:
            add_working_directory()
            self._keep = load_hook(KEY, path)

    @property
    def there(self) -> bool:
        """Whether there is a function."""
        return self._keep is not None

    def kept(self, taken: Sequence[_Taken]) -> list[_Taken]:
        """Those of the responses, ordered by episode, whose group is trained. Raises `HookError`."""
        if self._keep is None:
            return list(taken)
        found: list[_Taken] = []
        for number, members in groupby(taken, key=self._group_of):
            group = list(members)
            if self._ask(number, [one for one in group if one.episode is None]):
                found += group
        return found

    def _group_of(self, one: Finished) -> int:
        return (one.sample_id if one.episode is None else one.episode) // self._group_size

    def _ask(self, number: int, members: Sequence[Finished]) -> bool:
        assert self._keep is not None and self._path is not None
        group = FinishedGroup(
            sample_ids=tuple(one.sample_id for one in members),
            rewards=tuple(one.reward for one in members),
            lengths=tuple(one.end for one in members),
        )
        given = f"group {number} (samples {group.sample_ids[0]} to {group.sample_ids[-1]})"
        try:
            answer = self._keep(group)
        except Exception as error:  # the edge of the user's code
            raise blame(KEY, self._path, given, error) from error
        if not isinstance(answer, bool):
            raise HookError(
                f"{KEY}: {self._path} returned {answer!r} for {given}, not True or False; mend the function, and go on "
                "with --resume"
            )
        return answer
