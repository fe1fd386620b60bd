"""What users write is read as they mean it: paths, control characters, labels, special tokens of every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import make_model, small_topology, write_json, write_lines
from transformers import PreTrainedTokenizerFast

from opd_async.checks.inputs import read_inputs
from opd_async.config.topology_file import load_topology
from opd_async.config.yaml_source import parse_yaml
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

USER = {"role": "user", "content": "ab"}


def test_held_out_prompts_without_labels_are_refused(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "h.jsonl", {"prompt": "a", "truth": "1"}, {"prompt": "b", "label": "2"})
    with pytest.raises(InputError, match=r"data\.held_out\.label_key: .*1 of 2 prompts have no label under 'label'"):
        read_inputs(small_topology(tmp_path, f"data.held_out.path={rows}"))
    write_lines(rows, {"prompt": "a", "truth": "1"})
    keys = (f"data.held_out.path={rows}", "data.held_out.label_key=truth")
    found = read_inputs(small_topology(tmp_path, *keys))
    assert found.held_out["held_out"].prompts[0].label == "1"


def test_home_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_topology(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPD_DATA", "here")
    file = tmp_path / "t.yaml"
    data = json.loads(small.model_dump_json())
    data["run_dir"] = "~/runs"
    data["data"]["train"]["path"] = "${HOME}/${OPD_DATA}/a.jsonl"
    file.write_text(json.dumps(data))
    found = load_topology(file)
    assert found.run_dir == tmp_path / "runs"
    assert found.data.train is not None and found.data.train.path == tmp_path / "here/a.jsonl"
    for path, reason in (
        ("${OPD_UNSET}/x", "OPD_UNSET, which is not set"),
        ("~nobody-at-all/x", "home folder of nobody"),
    ):
        for key in ("run_dir", "data.train.path"):
            with pytest.raises(InputError, match=f"1 problem\\n  --set: {key}: .*{reason}"):
                load_topology(file, [f"{key}={path}"])


@pytest.mark.parametrize("code", [0, 7, 27, 127, 0xFFFE, 0xD800])
def test_control_characters_in_a_topology(tmp_path: Path, code: int) -> None:
    with pytest.raises(InputError, match=f"t.yaml: line 2: the character U\\+{code:04X} is not allowed"):
        parse_yaml(f"name: a\nrun_dir: b{chr(code)}c\n", "t.yaml")
    small = json.loads(small_topology(tmp_path).model_dump_json())
    (tmp_path / "t.yaml").write_text(json.dumps(small | {"run_dir": "runs\x07"}))
    with pytest.raises(InputError, match="control character"):
        load_topology(tmp_path / "t.yaml")
    with pytest.raises(InputError, match="is not allowed"):
        load_topology(tmp_path / "t.yaml", [f"run_dir=a{chr(code)}"])


def _dicts(**values: Any) -> dict[str, Any]:
    return values


LAYOUTS: dict[str, dict[str, Any]] = {
    "config": {
        "tokenizer_config.json": _dicts(tokenizer_class="PreTrainedTokenizerFast", bos_token="<bos>", eos_token="<eos>")
    },
    "map alone": {"special_tokens_map.json": _dicts(bos_token="<bos>", eos_token={"content": "<eos>"})},
    "map beside a config": {
        "tokenizer_config.json": _dicts(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>"),
        "special_tokens_map.json": _dicts(eos_token="<eos>"),
    },
    "map against a config": {
        "tokenizer_config.json": _dicts(tokenizer_class="PreTrainedTokenizerFast", eos_token="<bos>"),
        "special_tokens_map.json": _dicts(eos_token="<eos>"),
    },
    "map under added tokens": {
        "tokenizer_config.json": _dicts(
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token="<bos>",
            added_tokens_decoder={"2": {"content": "<eos>", "special": True}},
        ),
        "special_tokens_map.json": _dicts(eos_token="<eos>"),
    },
    "objects": {
        "tokenizer_config.json": _dicts(
            tokenizer_class="PreTrainedTokenizerFast", eos_token={"__type": "AddedToken", "content": "<eos>"}
        )
    },
    "none": {"tokenizer_config.json": _dicts(tokenizer_class="PreTrainedTokenizerFast")},
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_special_tokens_of_every_layout_as_transformers_has_them(tmp_path: Path, layout: str) -> None:
    folder = make_model(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    for name, values in LAYOUTS[layout].items():
        write_json(folder / name, values)
    (folder / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.end_id == theirs.eos_token_id
    assert ours.encode("ab1") == theirs.encode("ab1")
    assert ours.apply_chat_template([USER]) == theirs.apply_chat_template([USER], tokenize=False)
    np.testing.assert_array_equal(ours.encode("<eos>a"), theirs.encode("<eos>a"))
