"""Whatever stands in the files of a model folder: it is read, or refused in words, by all that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_fuzz import ANY_BYTES, FUZZ, other_headers, other_values
from hypothesis import given
from hypothesis import strategies as st
from small_runs import topology_data, write_json

from opd_async.data.decoder import read_shape
from opd_async.data.decoder_tensors import decoder_tensors
from opd_async.data.end_tokens import end_ids
from opd_async.data.model_folder import folder_problems, read_model, try_config
from opd_async.data.rope import rope_problem
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.weight_files import plain_problems, stored_tensors, tensor_problems
from opd_async.errors import InputError

USER = {"role": "user", "content": "ab"}
JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that is read, and a topology around it."""
    root = tmp_path_factory.mktemp("whole")
    topology_data(root)
    folder = root / "student"
    write_json(folder / "special_tokens_map.json", {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}})
    names = list(stored_tensors(folder))
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "model.safetensors")})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": None,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config | {"sliding_window": None, "layer_types": ["full_attention"] * 4})
    return root


def _tokenize(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    _ = (tokenizer.end_id, tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.tokens())
    tokenizer.decode(tokenizer.encode("ab<eos>"))
    tokenizer.encode_batch(["ab", ""], add_special_tokens=False)
    tokenizer.encode_chat([USER])


def _weights(folder: Path) -> None:
    tensor_problems(folder, decoder_tensors(read_shape(folder)))


READERS: tuple[Callable[[Path], object], ...] = (
    *(_tokenize, _weights, end_ids, read_model, folder_problems, read_shape, plain_problems, stored_tensors),
    lambda folder: rope_problem(try_config(folder)),
)


def read_everything(folder: Path) -> None:
    for read in READERS:
        try:
            read(folder)
        except InputError as error:
            assert str(error)


def changed(whole: Path, root: Path, name: str, content: bytes) -> None:
    """Read a copy of the folder in which one file has other content."""
    folder = root / "model"
    shutil.copytree(whole / "student", folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    read_everything(folder)


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_a_json_file(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(JSON_FILES))
    content = data.draw(other_values((whole / "student" / name).read_bytes()))
    changed(whole, tmp_path_factory.mktemp("fuzz"), name, content)


@FUZZ
@given(
    name=st.sampled_from(
        [*JSON_FILES, "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "model.safetensors"]
    ),
    content=ANY_BYTES,
)
def test_any_bytes_in_a_file(tmp_path_factory: pytest.TempPathFactory, whole: Path, name: str, content: bytes) -> None:
    changed(whole, tmp_path_factory.mktemp("fuzz"), name, content)


@FUZZ
@given(data=st.data())
def test_any_header_of_weights(tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject) -> None:
    content = data.draw(other_headers((whole / "student" / "model.safetensors").read_bytes()))
    changed(whole, tmp_path_factory.mktemp("fuzz"), "model.safetensors", content)


STATEMENTS = (
    "{{ messages }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ 1/0 }}",
    "{% if x %}",
    "{% endif %}",
    "{{ range(10**9) | list }}",
    "{{ messages[0].content * 3 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{{ cycler.__init__ }}",
    "{% set messages = 3 %}",
    "{{ 'a' | nothing }}",
    "{{ 9 ** 99 }}",
    "{% import 'a' as b %}",
    "{{ strftime_now(3) }}",
    "{{ tools | tojson(indent='x') }}",
    "{{ {}[[]] }}",
    "{{ 'é😀' }}",
    "{{ lipsum() }}",
    "{{ '%d' | format('a') }}",
    "{{ self }}",
    "{{ (0)['a'].b }}",
)


@FUZZ
@given(parts=st.lists(st.sampled_from(STATEMENTS), max_size=4))
def test_any_template(tmp_path_factory: pytest.TempPathFactory, whole: Path, parts: list[str]) -> None:
    changed(whole, tmp_path_factory.mktemp("fuzz"), "chat_template.jinja", "".join(parts).encode())
