"""Find the models that a topology names: folders stay, names of the hub are fetched, GGUF files converted."""

from __future__ import annotations

from collections.abc import Callable

from opd_async.config.topology import ModelSection, Topology
from opd_async.data.gguf import cached_folder, folder_of, is_gguf
from opd_async.data.hub import fetch_model, is_hub_name
from opd_async.errors import InputError

Say = Callable[[str], None]
"""Print a line."""


def with_models_here(topology: Topology, say: Say, *, weights: bool = True) -> tuple[Topology, list[str]]:
    """Fetch every model that is a name of the hub, convert every GGUF file once (`opd_async.data.gguf`).

    Returns the topology with folders, and what could not be had.
    A folder in the hub's cache names a commit, so that a resumed run sees whether it is the same model. Without
    `weights` only configs and tokenizers are fetched, which is enough for a plan.
    """
    problems: list[str] = []

    def here(key: str, model: ModelSection) -> ModelSection:
        """The model with the path of a folder, unless it cannot be had."""
        named = is_hub_name(model.path)
        if not named and model.revision is not None:
            problems.append(f"{key}.revision: {model.path} is no name of the hub; remove it, or write such a name")
        if not named and not is_gguf(model.path):
            return model
        try:
            if named:
                say(f"{key}.path: {model.path} is looked for on the hub, and fetched where it is not in the cache")
                folder = fetch_model(str(model.path), model.revision, weights=weights)
            else:
                if not cached_folder(model.path).is_dir():
                    say(f"{key}.path: {model.path} is converted, once; its folder is {cached_folder(model.path)}")
                folder = folder_of(model.path)
        except InputError as error:
            problems.append(f"{key}.path: {error}")
            return model
        return model.model_copy(update={"path": folder, "revision": None})

    models = topology.models
    update = {
        "student": here("models.student", models.student),
        "teacher": None if models.teacher is None else here("models.teacher", models.teacher),
        "teachers": {name: here(f"models.teachers.{name}", model) for name, model in models.teachers.items()},
    }
    return topology.model_copy(update={"models": models.model_copy(update=update)}), problems
