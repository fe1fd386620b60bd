"""Prompts of a function of the user's: read one by one, resumable, blamed by row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_runs import make_model, small_topology, topology_data, write_topology

from opd_async.checks.inputs import examine
from opd_async.config.topology import Topology
from opd_async.data.completions import CompletionSet
from opd_async.data.own_prompts import ENDLESS, KEPT, SECTION, OwnPrompts
from opd_async.data.prompts import PromptSet, Reading
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.hooks import HookError
from opd_async.run.fingerprints import differences, fingerprints
from opd_async.scheduling.leases import PromptOrder

MODULE = """
calls = []

class Squares:
    def __len__(self):
        return 10**12
    def __getitem__(self, index):
        calls.append(index)
        return {"prompt": f"{index}+{index}=", "label": str(2 * index)}

def squares():
    return Squares()

def counting():
    calls.append("called")
    for index in range(5):
        yield {"prompt": f"{index}="}

def few():
    return [{"prompt": "1="}, {"prompt": "2="}]

def other():
    return [{"prompt": "1="}, {"prompt": "3="}]

def raising():
    yield {"prompt": "1="}
    raise KeyError("no more")

def nothing():
    return []

def dry():
    return iter([])

def number():
    return 7

def long():
    return [{"prompt": "1" * 500}]

def broken():
    return [{"text": "1="}]

def needing(argument):
    return []
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rows.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("own_rows", None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_model(tmp_path_factory.mktemp("model")))


def own(name: str, tokenizer: Tokenizer, *, labelled: bool = False) -> OwnPrompts:
    return OwnPrompts(f"own_rows:{name}", Reading(SECTION, tokenizer), 64, labelled=labelled)


def calls() -> list[object]:
    return list(sys.modules["own_rows"].calls)


def test_a_sequence_is_asked_for_the_rows_that_are_needed_alone(tokenizer: Tokenizer) -> None:
    prompts = own("squares", tokenizer)
    assert len(prompts) == 10**12
    prompt = prompts[123_456_789]
    assert (prompt.prompt_id, prompt.label) == (123_456_789, "246913578")
    assert prompt.token_ids.tolist() == tokenizer.encode("123456789+123456789=")
    assert calls() == [123_456_789]


def test_an_iterator_is_advanced_and_begins_anew_where_it_ends(tokenizer: Tokenizer) -> None:
    prompts = own("counting", tokenizer)
    assert len(prompts) == ENDLESS
    wanted = [tokenizer.encode(f"{index % 5}=") for index in range(13)]
    assert [prompts[index].token_ids.tolist() for index in range(13)] == wanted
    assert [prompts[index].prompt_id for index in (12, 3, 12)] == [12, 3, 12], "kept rows are given again"
    resumed = own("counting", tokenizer)
    assert resumed[11].token_ids.tolist() == wanted[11], "a resumed run goes on where the last one was"


def test_an_iterator_goes_back_by_being_made_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_async.data.own_prompts.KEPT", 2)
    assert KEPT > 2
    prompts = own("counting", tokenizer)
    assert prompts[4].token_ids.tolist() == tokenizer.encode("4=")
    assert prompts[0].token_ids.tolist() == tokenizer.encode("0=")
    assert calls() == ["called"] * 2


def test_an_iterator_is_in_its_own_order() -> None:
    order = PromptOrder(ENDLESS, 2, 0, False)
    assert [order.prompt_of(sample) for sample in (0, 1, 2, 10**9)] == [0, 0, 1, 5 * 10**8]


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [
        ("raising", 1, "raised KeyError: 'no more' for row 1; mend the function, and go on with --resume"),
        ("long", 0, "gave row 0, which cannot be used: the prompt has 501 tokens, and at most 64 fit; leave it out"),
        ("broken", 0, "gave row 0, which cannot be used: no key 'prompt'; the keys there are text"),
        ("dry", 0, "returned an iterator without rows; mend the function"),
    ],
)
def test_a_row_that_is_of_no_use_is_blamed(tokenizer: Tokenizer, name: str, index: int, words: str) -> None:
    prompts = own(name, tokenizer)
    with pytest.raises(HookError) as caught:
        prompts[index]
    assert str(caught.value).startswith(f"data.function: own_rows:{name} {words}")


def test_a_rule_that_compares_asks_for_labels(tokenizer: Tokenizer) -> None:
    assert own("squares", tokenizer, labelled=True)[2].label == "4"
    with pytest.raises(HookError, match=r"gave row 0 without 'label', with which reward.kind compares responses"):
        own("few", tokenizer, labelled=True)[0]


def test_what_has_no_rows_is_refused(tokenizer: Tokenizer) -> None:
    for name, words in (("nothing", "returned no rows"), ("number", "returned int, not a sequence or an iterator")):
        with pytest.raises(HookError, match=f"data.function: own_rows:{name} {words}"):
            own(name, tokenizer)


def given(root: Path, *overrides: str) -> tuple[Topology, list[str]]:
    """A checked topology without a file of prompts, and what was said of it."""
    data = topology_data(root)
    del data["data"]["train"]
    said: list[str] = []
    topology, _ = examine(write_topology(root, data), list(overrides), said.append)
    return topology, said


def test_a_topology_with_a_function_needs_no_file(tmp_path: Path) -> None:
    topology, _ = given(tmp_path, "data.function=own_rows:squares")
    assert topology.data.train is None and topology.data.function == "own_rows:squares"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "data.train: no prompts to train on; write a path, or data.function: module:name in its place"),
        (["data.function=own_rows:needing"], "data.function: own_rows:needing takes (argument), but is called with ()"),
        (["data.function=own_rows:absent"], "data.function: own_rows:absent cannot be loaded (AttributeError"),
        (["data.function=own_rows:broken"], "data.function: own_rows:broken gave row 0, which cannot be used"),
        (["data.function=own_rows:nothing"], "data.function: own_rows:nothing returned no rows; mend the function"),
    ],
)
def test_what_is_wrong_is_known_before_the_start(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        given(tmp_path, *overrides)
    assert words in str(caught.value) and "--resume" not in str(caught.value)
    assert str(caught.value).count("data.function: own_rows") == bool(overrides), "said once"


def test_a_file_and_a_function_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train: there is data.function as well; remove one"):
        path = write_topology(tmp_path, topology_data(tmp_path))
        examine(path, ["data.function=own_rows:squares"], lambda line: None)


def test_another_function_is_another_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    topology = small_topology(tmp_path)

    def found(name: str) -> dict[str, str]:
        data = topology.data.model_copy(update={"train": None, "function": f"own_rows:{name}"})
        changed = topology.model_copy(update={"data": data})
        return fingerprints(changed, PromptSet(own(name, tokenizer), 0), {}, CompletionSet())

    assert found("few") == found("few")
    assert differences(found("few"), found("other")) == ["data.function"]
    assert found("squares")["data.function"] != found("counting")["data.function"]
