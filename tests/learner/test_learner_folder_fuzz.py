"""Whatever stands in the files of a student's folder: the learner loads it, or refuses it in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from folder_fuzz import ANY_BYTES, FUZZ, other_headers, other_values
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_learner import write_model

from opd_async.errors import InputError
from opd_async.learner.config import ParallelConfig
from opd_async.learner.convert import hf_to_megatron
from opd_async.learner.distributed.parallel import Place

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the learner reads."""
    folder = write_model(tmp_path_factory.mktemp("whole") / "model", "qwen3-tied")
    names = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def load(whole: Path, root: Path, name: str, content: bytes) -> None:
    """Load a copy of the folder in which one file has other content."""
    folder = root / "model"
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(content)
    try:
        hf_to_megatron(folder, root / "megatron", ParallelConfig())
    except InputError as error:
        assert str(folder) in str(error)


@FUZZ
@given(data=st.data())
def test_any_value_in_a_json_file(
    alone: Place, tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["config.json", INDEX]))
    content = data.draw(other_values((whole / name).read_bytes()))
    load(whole, tmp_path_factory.mktemp("fuzz"), name, content)


@FUZZ
@given(name=st.sampled_from(["config.json", INDEX, WEIGHTS]), content=ANY_BYTES)
def test_any_bytes_in_a_file(
    alone: Place, tmp_path_factory: pytest.TempPathFactory, whole: Path, name: str, content: bytes
) -> None:
    load(whole, tmp_path_factory.mktemp("fuzz"), name, content)


@FUZZ
@given(data=st.data())
def test_any_header_of_weights(
    alone: Place, tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject
) -> None:
    content = data.draw(other_headers((whole / WEIGHTS).read_bytes()))
    load(whole, tmp_path_factory.mktemp("fuzz"), WEIGHTS, content)
