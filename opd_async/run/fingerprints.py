"""What a run reads, by content: a run that goes on must find the prompts and the models that it began with.

    inputs.json    {"data.train": sha256, "data.held_out": ..., "models.student": ..., "models.teacher": ...}

Prompts of a file count as the launcher has read them (tokens, labels, metadata, in order), so that a file may move or
be stored in another form, and another chat template shows. Of a function count its name and its first prompts. Of a
model folder count configuration and tokenizer; a teacher's weights by the names and sizes of their files, the student's
not at all: they are in the checkpoint, unless its first weights are its teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from opd_async.config.evaluating import SETS
from opd_async.config.topology import Topology
from opd_async.data.completions import Completion, CompletionSet
from opd_async.data.prompts import Prompt, PromptSet
from opd_async.errors import InputError

INPUTS_FILE = "inputs.json"
FIRST = 16
"""So many prompts of a function stand for all of them."""
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)


def fingerprints(
    topology: Topology, train: PromptSet, held_out: Mapping[str, PromptSet], completions: CompletionSet
) -> dict[str, str]:
    """sha256 in hexadecimal of everything that the run reads, by section of the topology. Raises `OSError`."""
    if topology.data.function is not None:  # nobody reads all that a function may give
        first = (train.prompts[index] for index in range(min(FIRST, len(train.prompts))))
        found = {"data.function": _of([topology.data.function.encode(), *map(_prompt, first)])}
    else:
        found = {"data.train": _of(map(_prompt, train.prompts))}
    for name, one in topology.evaluation_sets.items():
        found[one.key] = _of(map(_as_student_reads, held_out[name].prompts))  # who judges may change
    if topology.data.completions is not None:
        found["data.completions"] = _of(map(_completion, completions.completions))
    student = topology.models.student.path
    found["models.student"] = _of([*_files(student), *(_weights(student) if _needs_first_weights(topology) else ())])
    models = {"models.teacher": topology.models.teacher} if topology.models.teacher is not None else {}
    models |= {f"models.teachers.{name}": model for name, model in topology.models.teachers.items()}
    for key, model in models.items():
        found[key] = _of([*_files(model.path), *_weights(model.path)])
    return found


def _needs_first_weights(topology: Topology) -> bool:
    """Whether a run that goes on reads the student's folder again for a model that never changes."""
    opd, load = topology.opd, topology.learner.load
    frozen = opd.of_itself and opd.self.weights == "frozen" and opd.teacher_load is None
    return load is None and frozen


def differences(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Sections whose content was another one when the run began. An evaluation set may come and go."""
    return [key for key in saved if now.get(key) != saved[key] and (key in now or not key.startswith(f"{SETS}."))]


def read(folder: Path) -> dict[str, str]:
    """What a run began with; empty for a run of an earlier version, which did not say. `InputError` if unreadable."""
    path = folder / INPUTS_FILE
    try:
        found = json.loads(path.read_bytes())
        return {str(key): str(value) for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); remove it to go on without comparing the run's inputs"
        ) from None


def _of(parts: Iterable[bytes]) -> str:
    """One digest of parts whose limits count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _as_student_reads(prompt: Prompt) -> bytes:
    words = json.dumps([prompt.label, prompt.metadata_json, prompt.teacher]).encode()
    return len(words).to_bytes(8, "little") + words + prompt.token_ids.tobytes()


def _prompt(prompt: Prompt) -> bytes:
    read = b"" if prompt.teacher_ids is None else b"read by its teacher" + prompt.teacher_ids.tobytes()
    if prompt.contrast_ids is not None:
        read += b"and beside it" + prompt.contrast_ids.tobytes()
    return _as_student_reads(prompt) + read


def _completion(completion: Completion) -> bytes:
    response = completion.response.tobytes()
    return len(response).to_bytes(8, "little") + response + _prompt(completion.prompt)


def _files(folder: Path) -> list[bytes]:
    present = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    return [part for path in present for part in (path.name.encode(), path.read_bytes())]


def _weights(folder: Path) -> list[bytes]:
    return [f"{path.name} {path.stat().st_size}".encode() for path in sorted(folder.glob("*.safetensors"))]
