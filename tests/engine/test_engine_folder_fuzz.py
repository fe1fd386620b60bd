"""Whatever stands in the files of a model folder: the embedded engine loads it, or refuses it in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_harness import make_model
from folder_fuzz import ANY_BYTES, FUZZ, SMALL_VALUE, other_headers, other_values
from hypothesis import given
from hypothesis import strategies as st

from opd_async.actors.engine.errors import WeightError
from opd_async.actors.engine.groups import WeightGroups
from opd_async.actors.engine.model import ModelRunner
from opd_async.actors.engine.text import load_codec
from opd_async.actors.engine.weights import ModelWeights
from opd_async.errors import InputError

WEIGHTS = "model.safetensors"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
THIRD_PARTY = pytest.mark.filterwarnings("ignore")  # transformers warns about odd configs before it refuses them


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the engine reads."""
    folder = make_model(tmp_path_factory.mktemp("whole") / "model")
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 7}, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    return folder


def load(folder: Path) -> ModelRunner:
    return ModelRunner(folder, dtype="float32", device="cpu", pool_tokens=64, seed=0)


@pytest.fixture(scope="module")
def weights(whole: Path) -> ModelWeights:
    """The weights of a running engine."""
    return ModelWeights(load(whole).model, WeightGroups(1.0, torch.device("cpu")))


def copy(whole: Path, root: Path, name: str, content: bytes) -> Path:
    """A folder in which one file has other content."""
    folder = root / "model"
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(content)
    return folder


def start(folder: Path) -> None:
    """What an engine reads when it starts."""
    for read in (load, load_codec):
        try:
            read(folder)
        except InputError as error:
            assert str(folder) in str(error)


@THIRD_PARTY
@FUZZ
@given(data=st.data())
def test_any_value_in_a_json_file(tmp_path_factory: pytest.TempPathFactory, whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(JSON_FILES))
    content = data.draw(other_values((whole / name).read_bytes(), SMALL_VALUE))
    start(copy(whole, tmp_path_factory.mktemp("fuzz"), name, content))


@THIRD_PARTY
@FUZZ
@given(name=st.sampled_from([*JSON_FILES, WEIGHTS]), content=ANY_BYTES)
def test_any_bytes_in_a_file(tmp_path_factory: pytest.TempPathFactory, whole: Path, name: str, content: bytes) -> None:
    start(copy(whole, tmp_path_factory.mktemp("fuzz"), name, content))


@THIRD_PARTY
@FUZZ
@given(data=st.data())
def test_any_header_of_weights(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, weights: ModelWeights, data: st.DataObject
) -> None:
    """Read by an engine that starts and by one that is told to load it, which keeps what it has if it refuses."""
    content = data.draw(other_headers((whole / WEIGHTS).read_bytes()))
    folder = copy(whole, tmp_path_factory.mktemp("fuzz"), WEIGHTS, content)
    start(folder)
    before = weights.checksums()
    try:
        weights.load_folder(folder)
    except WeightError as error:
        assert str(error)
        assert weights.checksums() == before
    else:
        weights.load_folder(whole)
        assert weights.checksums() == before
