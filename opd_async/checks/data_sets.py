"""Find the data sets that a topology names: files stay what they are, names of the hub are fetched."""

from __future__ import annotations

from typing import TypeVar

from opd_async.checks.models import Say
from opd_async.config.evaluating import SETS, EvaluationSetSection
from opd_async.config.inputs import CompletionsSection, PromptsSection
from opd_async.config.topology import Topology
from opd_async.data.hub_data import fetch_data_set, is_data_set
from opd_async.errors import InputError

_Section = TypeVar("_Section", PromptsSection, EvaluationSetSection, CompletionsSection)
_OWN = ("subset", "split", "revision")
"""Keys that only a data set of the hub has."""


def with_data_here(topology: Topology, say: Say) -> tuple[Topology, list[str]]:
    """Fetch every data set that is a name of the hub; returns the topology with files, and what could not be had."""
    problems: list[str] = []
    update: dict[str, PromptsSection | CompletionsSection] = {}
    for key in ("train", "held_out", "completions"):
        section = getattr(topology.data, key)
        if section is not None:
            try:
                update[key] = _here(f"data.{key}", section, say)
            except InputError as error:
                problems.append(f"data.{key}{error}")
    sets = dict(topology.evaluation.sets)
    for name, one in sets.items():
        key = f"{SETS}.{name}"
        try:
            sets[name] = _here(key, one, say)
        except InputError as error:
            problems.append(f"{key}{error}")
    evaluation = topology.evaluation.model_copy(update={"sets": sets})
    data = topology.data.model_copy(update=update)
    return topology.model_copy(update={"data": data, "evaluation": evaluation}), problems


def _here(key: str, section: _Section, say: Say) -> _Section:
    """The section with the path of a file. Raises `InputError`, which begins with the rest of the key."""
    paths = section.path if isinstance(section.path, tuple) else (section.path,)
    if not any(is_data_set(path) for path in paths):
        if given := [name for name in _OWN if getattr(section, name) is not None]:
            raise InputError(f".{given[0]}: {paths[0]} is no data set of the hub; remove it, or write hf://owner/name")
        return section
    if len(paths) > 1:
        raise InputError(".path: a data set of the hub stands alone; write one name, or files only")
    say(f"{key}.path: hf://{'/'.join(paths[0].parts[1:])} is looked for on the hub, and fetched where it is not cached")
    try:
        file = fetch_data_set(
            paths[0], subset=section.subset, split=section.split or "train", revision=section.revision
        )
    except InputError as error:
        raise InputError(f".path: {error}") from None
    return section.model_copy(update={"path": file} | dict.fromkeys(_OWN))
