"""Read what a Hugging Face checkpoint folder says about its model, without loading a weight.

`folder_problems` names everything that is missing or broken. `read_model` returns the facts that planning needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from opd_async.data.end_tokens import end_ids
from opd_async.data.json_object import read_object
from opd_async.data.rope_shape import positions
from opd_async.data.weight_files import file_problems
from opd_async.errors import InputError

_SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes from `config.json`, and the ids that end a response (`opd_async.data.end_tokens`)."""

    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    max_tokens: int
    """Tokens that it has positions for: `max_position_embeddings`, or what YaRN makes of it."""
    limit: str
    """What that number is, for messages."""
    eos_token_ids: tuple[int, ...]
    experts: int
    """Experts of a layer, in place of its MLP; 0 for a dense model."""

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts."""
        return self.experts > 0


def read_model(folder: Path) -> ModelFacts:
    """Read the facts of the model in `folder`. Raises `InputError` if `config.json` is missing or lacks a size."""
    config = read_object(folder / "config.json")
    wrong = [name for name in _SIZES if not _is_size(config.get(name))]
    if wrong:
        raise InputError(f"{folder / 'config.json'}: no whole number for {', '.join(wrong)}; give a complete config")
    kv_heads, most = config.get("num_key_value_heads"), positions(config)
    stretched = most > config["max_position_embeddings"]
    return ModelFacts(
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=kv_heads if _is_size(kv_heads) else config["num_attention_heads"],
        max_tokens=most,
        limit="positions, stretched by YaRN, for" if stretched else "max_position_embeddings",
        eos_token_ids=end_ids(folder),
        experts=next((config[name] for name in ("num_experts", "num_local_experts") if _is_size(config.get(name))), 0),
    )


def try_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`; empty where it cannot be read. `folder_problems` says why."""
    try:
        return read_object(folder / "config.json")
    except InputError:
        return {}


def try_model(folder: Path) -> ModelFacts | None:
    """Read the facts of the model as `read_model` does; None where it raises. `folder_problems` says why."""
    try:
        return read_model(folder)
    except InputError:
        return None


def folder_problems(folder: Path, any_name: bool = False) -> list[str]:
    """List what is missing or broken in a checkpoint folder, each as "found; what to do"; empty if nothing is.

    With `any_name` the weights may have other file names than those that transformers looks for.
    """
    if not folder.is_dir():
        return [f"no folder {folder}; give the folder of a Hugging Face checkpoint"]
    problems = [
        f"{folder} has no {name}; add it, or give a complete checkpoint folder"
        for name in ("config.json", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if (folder / "config.json").is_file():
        try:
            read_model(folder)
        except InputError as error:
            problems.append(str(error))
    return problems + file_problems(folder, any_name)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
