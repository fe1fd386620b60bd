"""Several data files as one: folders, patterns, gzip, their order, what is kept of them; and any bytes at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chat_rows import SYSTEM, TEMPLATE, TOOLS, USER, load, refused, with_template, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_model, small_topology, write_lines, write_topology

from opd_async.checks.inputs import examine, read_inputs
from opd_async.config.topology import PromptsSection, Topology
from opd_async.config.topology_file import load_topology
from opd_async.data import prompt_cache
from opd_async.data.messages import ChatOptions
from opd_async.data.prompts import load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.run.fingerprints import differences, fingerprints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tmp_path_factory.mktemp("forms"), TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def letters(path: Any, folder: Path) -> list[int]:
    """The last token of each prompt."""
    found = load(path, folder).prompts
    assert [prompt.prompt_id for prompt in found] == list(range(len(found)))
    return [int(prompt.token_ids[-1]) for prompt in found]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "tables").mkdir(parents=True)
    write_lines(data / "b.jsonl", {"prompt": "a"})
    (data / "a.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "b"}\n{"prompt": "c"}\n'))
    write_table(data / "tables" / "2.parquet", [{"prompt": "d"}])
    write_table(data / "tables" / "10.parquet", [{"prompt": "e"}])
    (data / "README.md").write_text("about")
    (data / ".hidden.jsonl").write_text("no JSON")
    return data


def test_several_files_a_folder_gzip_and_a_pattern(data: Path, folder: Path) -> None:
    first, second = data / "b.jsonl", data / "a.jsonl.gz"
    assert letters(data, folder) == [4, 5, 3], "a folder's by name"
    assert letters((first, second), folder) == [3, 4, 5], "a list's in its order"
    assert letters(data / "*.jsonl*", folder) == [4, 5, 3]
    assert letters(data / "**" / "*.parquet", folder) == letters(data / "tables", folder) == [7, 6], "10 before 2"
    assert letters((data / "tables" / "2.parquet", data / "tables" / "1*"), folder) == [6, 7]
    odd = write_lines(data / "x[1].jsonl", {"prompt": "f"})
    assert letters(odd, folder) == [8], "a file's own name is no pattern"


def test_files_that_cannot_be_read_as_one(tmp_path: Path, data: Path, folder: Path) -> None:
    first, table = data / "b.jsonl", data / "tables" / "2.parquet"
    (tmp_path / "link.jsonl").symlink_to(first)
    wrong = {
        "no file": tmp_path / "no.jsonl",
        "no file has a name like this": data / "*.csv",
        "is none of .jsonl, .jsonl.gz, .parquet": data / "README.md",
        "README.md is none of": data / "*",
        "a folder without": make_model(tmp_path / "empty"),
        f"{first}, twice": (first, first),
        f"{first} and {tmp_path / 'link.jsonl'}, the same file twice": (first, tmp_path / "link.jsonl"),
        "b.jsonl, twice; its rows would count twice": (data, first),
        f"{first} and {table} are of two kinds": (first, table),
        "File name too long": data / ("x" * 300),
    }
    for words, path in wrong.items():
        assert words in refused(path, folder)
    write_lines(data / "a.jsonl", {"prompt": "b"})
    assert "a.jsonl and " in refused(data, folder) and "the same file twice" in refused(data, folder)
    (data / "a.jsonl").unlink()
    whole = (data / "a.jsonl.gz").read_bytes()
    for harmed in (whole[:-9], whole[:12] + b"\xff" + whole[13:], b"plain"):
        (data / "a.jsonl.gz").write_bytes(harmed)
        assert "a.jsonl.gz: " in refused(data, folder)
    (data / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "b"}\n[1]\n'))
    assert f"{data / 'a.jsonl.gz'}:2: holds a list" in refused(data, folder)


def test_several_files_in_a_topology(tmp_path: Path, data: Path) -> None:
    topology = small_topology(tmp_path, f"data.train.path=[{data}/b.jsonl, {data}/a.jsonl.gz]")
    assert topology.data.train is not None
    assert topology.data.train.path == (data / "b.jsonl", data / "a.jsonl.gz")
    assert [int(one.token_ids[-1]) for one in read_inputs(topology).prompts.prompts] == [3, 4, 5]
    path = tmp_path / "topology.yaml"
    given = json.loads(topology.model_dump_json())
    write_topology(tmp_path, given)
    assert load_topology(path) == topology and Topology(**given) == topology
    changed = load_topology(path, [f"data.train.path.1={data}/tables/2.parquet"])
    assert changed.data.train is not None and changed.data.train.path[1] == data / "tables/2.parquet"  # type: ignore[index]
    wrong = {
        "3": "found 3; write a path, or a list of one or more, each a path",
        "[]": r"found \[\]; write a path, or a list of one or more, each a path",
        "${OPD_UNSET}/x": ".* OPD_UNSET, which is not set",
        "[a.jsonl, 3]": r"1: found 3; write a path",
        "[a.jsonl, '${OPD_UNSET}/x']": ".* OPD_UNSET, which is not set",
    }
    for value, words in wrong.items():
        with pytest.raises(InputError, match=rf"1 problem\n  --set: data\.train\.path(: |\.){words}") as caught:
            load_topology(path, [f"data.train.path={value}"])
        assert "<a " not in str(caught.value)
    with pytest.raises(InputError, match=r"data\.train\.path: .*b\.jsonl, twice"):
        examine(path, [f"data.train.path=[{data}/b.jsonl, {data}/b.jsonl]"], lambda line: None)


def test_every_file_and_every_key_makes_other_columns(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is by content: of all files, in order, and of all that decides what a row becomes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "SMALL_BYTES", 0)
    row = {"prompt": "ab", "chat": [USER], "tools": TOOLS, "more": [{"name": "h"}]}
    a, b = write_lines(tmp_path / "a.jsonl", row), write_lines(tmp_path / "b.jsonl", row | {"chat": [SYSTEM, USER]})

    def ids(path: Any = (a, b), *, chats: ChatOptions = ChatOptions(), **keys: Any) -> list[Any]:  # noqa: B008
        found = load(path, folder, chats, **({"prompt_key": "chat"} | keys)).prompts
        return [prompt.token_ids.tolist() for prompt in found]

    ways = [
        ids(),
        ids((b, a)),
        ids(tools_key="more"),
        ids(tools_key=None),
        ids(chats=ChatOptions(system_prompt="j")),
        ids(chats=ChatOptions(template_kwargs={"deep": True})),
        ids(prompt_key="prompt", tools_key=None),
        ids(prompt_key="prompt", tools_key=None, chats=ChatOptions(as_chat=True)),
    ]
    kept = prompt_cache.cache_folder()
    assert len({json.dumps(way) for way in ways}) == len(ways) == len(list(kept.iterdir()))
    assert ids() == ways[0] and len(list(kept.iterdir())) == len(ways), "found again"
    write_lines(b, row | {"chat": [{"role": "user", "content": "j"}]})
    assert ids()[0] == ways[0][0] and ids()[1] != ways[0][1]


def test_the_fingerprint_of_a_run_has_every_file(tmp_path: Path, data: Path) -> None:
    def found(*overrides: str) -> dict[str, str]:
        topology = small_topology(tmp_path, *overrides)
        inputs = read_inputs(topology, lambda line: None)
        return fingerprints(topology, inputs.prompts, inputs.held_out, inputs.completions)

    listed = f"data.train.path=[{data}/a.jsonl.gz, {data}/b.jsonl]"
    before = found(listed)
    assert found(f"data.train.path={data}") == found(f"data.train.path={data}/*.jsonl*") == before, "the same rows"
    assert differences(before, found(f"data.train.path=[{data}/b.jsonl, {data}/a.jsonl.gz]")) == ["data.train"]
    write_lines(data / "b.jsonl", {"prompt": "ab"})
    assert differences(before, found(listed)) == ["data.train"]


# --- anything at all -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: json.dumps([{"prompt": text}])[1:-1].encode())
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: bytes
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    for name, content in (
        ("p.jsonl", data),
        ("p.jsonl.gz", data),
        ("z.jsonl.gz", gzip.compress(data)),
        ("p.parquet", data),
    ):
        (root / name).write_bytes(content)
        try:
            load_prompts(PromptsSection(path=root / name), tokenizer, 64)
        except InputError as error:
            assert str(root / name) in str(error)


@settings(max_examples=60, deadline=None)
@given(
    row=st.dictionaries(
        st.sampled_from(["prompt", "label", "metadata", "tools"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=4),
            lambda part: (
                st.lists(part, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "type", "text"]), part, max_size=4)
            ),
            max_leaves=8,
        ),
    )
)
def test_any_row_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, row: dict[str, Any]
) -> None:
    path = write_lines(tmp_path_factory.mktemp("fuzz") / "p.jsonl", json.dumps(row))
    try:
        load_prompts(PromptsSection(path=path), tokenizer, 64, chats=ChatOptions(as_chat=True, system_prompt="j"))
    except InputError as error:
        assert str(path) in str(error)
