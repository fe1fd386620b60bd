"""The calculator example: the tool, the expressions and their transcripts, the episode, what its models train on."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_models import STUDENT, build_model, save
from tokenizer import EOS, VOCAB_SIZE, build_tokenizer

from opd_async.checks.inputs import examine

FOLDER = Path(__file__).parents[2] / "examples" / "calculator"


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """The example's modules import one another as its script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


@pytest.fixture(scope="module")
def made(path: None) -> ModuleType:
    """The script, as a module of another name than that of another example's."""
    spec = importlib.util.spec_from_file_location("make_calculator_pair", FOLDER / "make_pair.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass
class Turn:
    """What a session returns of a turn."""

    text: str
    finish: str = "stop"


class Told:
    """A session whose student says given turns."""

    def __init__(self, *says: Turn) -> None:
        self.says, self.text = list(says), ""

    async def generate(self, *, max_tokens: int, stop: str) -> Turn:
        turn = self.says.pop(0)
        assert stop not in turn.text[:-1] and len(turn.text) <= max_tokens
        self.text += turn.text
        return turn

    async def give(self, what: str) -> None:
        self.text += what


def run(label: str, *says: Turn) -> tuple[float, Told]:
    """The reward of an episode, and its session."""
    from episode import episode

    session = Told(*says)
    return asyncio.run(episode(session, {"label": label})), session


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("[47+58]", "0105"),
        ("[0105*29]", "3045"),
        ("[13-0013]", "0000"),
        ("[13-14]", None),
        ("[9999+10]", None),
        ("[99*0101]", "9999"),
        ("[47+58", None),
        ("47+58]", None),
        ("[47+58+1]", None),
        ("[4+5]", None),
        ("[00047+58]", None),
        ("[٤٧+58]", None),
        ("]", None),
        ("[47+58]\n", None),
    ],
)
def test_the_calculator_shows_four_digits_or_nothing(call: str, shown: str | None) -> None:
    from episode import calculate

    assert calculate(call) == shown


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32))
def test_transcripts_are_what_an_episode_of_a_good_student_is(seed: int) -> None:
    from expressions import ALPHABET, draw, transcript

    for problem in draw(2, seed=seed, held_out=False):
        text, said = transcript(problem)
        assert set(problem.prompt + text) <= set(ALPHABET)
        reward, session = run(problem.label, *(Turn(spoken) for spoken, _ in problem.turns))
        assert (reward, session.text, session.says) == (1.0, text, [])
        own = "".join(character for character, mine in zip(text, said, strict=True) if mine)
        assert own == "".join(spoken for spoken, _ in problem.turns)
        value = eval(problem.prompt[:-1])  # what Python makes of the same expression
        assert value == problem.results()[-1] == int(problem.label)


def test_brackets_stand_where_they_are_needed() -> None:
    from expressions import Problem

    numbers = (10, 20, 30, 40)
    assert Problem(numbers, "+*-", (True, True)).prompt == "(10+20)*30-40="
    assert Problem(numbers, "*+-", (True, True)).prompt == "10*20+30-40="
    assert Problem(numbers, "+--", (False, False)).prompt == "40-(30-(10+20))="
    assert Problem(numbers, "*-*", (False, False)).prompt == "40*(30-10*20)="
    assert Problem(numbers[:3], "*+", (False,)).prompt == "30+10*20="
    assert not Problem((10, 20, 30), "-+", (True,)).possible, "no number below 0 on the way"


@pytest.mark.parametrize(
    "says",
    [
        [Turn(":0106")],
        [Turn(":0105", "length")],
        [Turn(":0105]")],
        [Turn("0105")],
        [Turn("")],
        [Turn("[47+58]"), Turn(":105")],
        [Turn("[47-58]")],
        [Turn("[47+58]")] * 4,
        [Turn("[47+58]"), Turn("[0105+0105+", "length")],
    ],
)
def test_other_episodes_earn_nothing_and_end(says: list[Turn]) -> None:
    reward, session = run("0105", *says)
    assert reward == 0.0 and session.says == []


def test_an_episode_may_take_more_calls_than_it_needs() -> None:
    calls = [Turn("[47+50]"), Turn("[47+58]"), Turn("[0105-10]")]
    assert run("0105", *calls, Turn(":0105"))[0] == 1.0


def test_splits_are_disjoint_and_drawn_alike_each_time() -> None:
    from expressions import draw, held_out_problems

    train, held_out = draw(3000, seed=0, held_out=False), held_out_problems(300)
    assert draw(10, seed=0, held_out=False) == train[:10] and held_out_problems(10) == held_out[:10]
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in held_out}
    assert {len(problem.operations) for problem in train} == {2, 3}
    assert all(problem.possible for problem in [*train, *held_out])


def test_what_is_given_does_not_count_in_the_loss(made: ModuleType) -> None:
    from expressions import Problem

    tokenizer = build_tokenizer("0123456789+-*()=[]:")
    problems = [Problem((47, 58, 29), "+*", (True,)), Problem((47, 58, 29, 13), "+*-", (True, True))]
    inputs_BT, labels_BT = made.encode(tokenizer, problems)
    assert inputs_BT.shape == labels_BT.shape
    for problem, inputs, labels in zip(problems, inputs_BT.tolist(), labels_BT.tolist(), strict=True):
        counted = [token for token in labels if token != made.IGNORED]
        assert tokenizer.decode(counted, skip_special_tokens=False) == (
            "".join(spoken for spoken, _ in problem.turns) + EOS
        )
        assert all(label in (made.IGNORED, after) for label, after in zip(labels, inputs[1:], strict=False) if after)


def test_the_share_of_right_episodes_is_that_of_a_loop_over_them(made: ModuleType) -> None:
    from expressions import held_out_problems, transcript

    torch.manual_seed(0)
    tokenizer, model = build_tokenizer("0123456789+-*()=[]:"), build_model(STUDENT, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8.0)
    problems = held_out_problems(5)
    sampled = 0.0
    for problem in problems:
        text, said = transcript(problem)
        ids = tokenizer.encode(problem.prompt + text + EOS).ids
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids[:-1]])).logits[0].softmax(-1)
        own = [*said, True]
        first = len(ids) - len(own)
        chance = 1.0
        for index, mine in enumerate(own):
            chance *= float(table[first + index - 1, ids[first + index]]) if mine else 1.0
        sampled += chance / len(problems)
    found, greedy = made.share_right(model, tokenizer, problems)
    assert found == pytest.approx(sampled, rel=1e-3) and 0.0 <= greedy <= 1.0


def test_training_teaches_and_the_topology_passes_its_check(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expressions import ALPHABET, Problem, draw

    assert len(ALPHABET) + 4 <= VOCAB_SIZE
    tokenizer, model = build_tokenizer(ALPHABET), build_model(STUDENT, 1)
    short = dataclasses.replace(made.STUDENT, steps=12, pool=8)
    before, labels = made.encode(tokenizer, draw(8, seed="student-1", held_out=False))
    losses = []
    for _ in range(2):
        with torch.no_grad():
            logits = model(input_ids=before).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)))
        made.train(model, tokenizer, short, 1)
    assert losses[1] < 0.9 * losses[0]

    folder = tmp_path / "examples/calculator/data"
    folder.mkdir(parents=True)
    (folder.parent / "episode.py").write_text((FOLDER / "episode.py").read_text())
    for side in ("student", "teacher"):
        save(model, folder / side, ALPHABET)
    problems = [Problem((47, 58, 29, 13), "+*-", (True, True)), Problem((10, 20, 30), "*-", (True,))]
    made.write_rows(folder / "train.jsonl", problems)
    made.write_rows(folder / "held_out.jsonl", problems[:1])
    row = {"prompt": "(47+58)*29-13=", "label": "3032", "metadata": {"operations": 3}}
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0]) == row
    monkeypatch.chdir(tmp_path)
    topology, inputs = examine(FOLDER / "calculator.yaml", [], str)
    assert topology.evaluation.judge == "reward" and topology.reward.kind == "episode"
    for problem, prompt in zip(problems, inputs.prompts.prompts, strict=True):
        assert prompt.token_ids.tolist() == tokenizer.encode(problem.prompt).ids
        assert len(prompt.token_ids) + 64 <= 128
