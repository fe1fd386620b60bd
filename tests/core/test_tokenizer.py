"""The tokenizer agrees with transformers, without importing it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import WORDS, make_model, write_json
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

CHAT = [{"role": "user", "content": " abc "}, {"role": "assistant", "content": "d1"}, {"role": "user", "content": "e"}]


def reference(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def set_config(folder: Path, **changes: object) -> Path:
    file = folder / "tokenizer_config.json"
    write_json(file, json.loads(file.read_text()) | changes)
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with special tokens, padding and truncation left over from a training run."""
    folder = tmp_path_factory.mktemp("bytes")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevel()
    library.train_from_iterator(
        ["the cat sat on the mat", "ein Bär läuft über die Straße", "1 + 1 = 2"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    )
    return folder


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text("</s> theca", max_size=40))
def test_text_to_ids_and_back_as_transformers_does(byte_level: Path, text: str) -> None:
    ours, theirs = Tokenizer(byte_level), reference(byte_level)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch([text, "the"], add_special_tokens=False) == [
        theirs.encode(part, add_special_tokens=False) for part in (text, "the")
    ]


def test_the_example_models() -> None:
    folder = Path("examples/addition/models/student")
    ours, theirs = Tokenizer(folder), reference(folder)
    assert ours.encode("347+589=") == theirs.encode("347+589=") == [1, 6, 7, 10, 13, 8, 11, 12, 14]
    assert ours.decode([10, 12, 14, 2]) == theirs.decode([10, 12, 14, 2], skip_special_tokens=True) == "79="
    assert ours.tokens() == Tokenizer(Path("examples/addition/models/teacher")).tokens()
    assert ours.tokens() == {index: token for token, index in theirs.get_vocab().items()}
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_chats_as_transformers_does(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    ours, theirs = Tokenizer(folder), reference(folder)
    text = ours.apply_chat_template(CHAT)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<bos>uabc<eos>") and text.endswith("<eos>a")
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == list(ids)
    assert ours.encode_chat(CHAT).count(1) == 1


def test_names_that_templates_use(tmp_path: Path) -> None:
    template = (
        "{{ strftime_now('%Y') }}{{ {'b': '<é>', 'a': 1} | tojson }}{{ [1, 2] | tojson(indent=1) }}\n"
        "    {% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}\n"
        "{% generation %}x{{ eos_token }}{% endgeneration %}{{ unk_token is defined }}{{ pad_token }}"
    )
    folder = set_config(make_model(tmp_path), chat_template=template)
    ours = Tokenizer(folder).apply_chat_template(CHAT)
    assert ours == reference(folder).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.startswith(str(datetime.datetime.now().year))


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    set_config(folder, chat_template=named)
    assert Tokenizer(folder).apply_chat_template(CHAT) == "d<eos>"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer(folder).apply_chat_template(CHAT) == "file"
    override = tmp_path / "own.jinja"
    with pytest.raises(InputError, match=r"data\.chat_template: no file"):
        Tokenizer(folder, override)
    override.write_text("own")
    assert Tokenizer(folder, override).apply_chat_template(CHAT) == "own"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"has no chat template; give one in data\.chat_template"):
        Tokenizer(folder).apply_chat_template(CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages[7].content }}", "has no element 7|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "concatenate"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_templates_that_fail_or_reach_out(tmp_path: Path, template: str, reason: str) -> None:
    folder = set_config(make_model(tmp_path), chat_template=template)
    with pytest.raises(InputError, match=f"refuses the messages: .*({reason})"):
        Tokenizer(folder).apply_chat_template(CHAT)


def test_a_template_that_writes_no_text(tmp_path: Path) -> None:
    folder = set_config(make_model(tmp_path), chat_template="{{ '\\ud83d' }}")
    with pytest.raises(InputError, match=r"the chat template of .* makes .* half of a surrogate pair"):
        Tokenizer(folder).apply_chat_template(CHAT)


def test_broken_folders(tmp_path: Path) -> None:
    folder = set_config(make_model(tmp_path), chat_template="{% if %}")
    with pytest.raises(InputError, match="line 1"):
        Tokenizer(folder)
    for content, reason in (("{", "not valid JSON"), ("[]", "holds no JSON object")):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=reason):
            Tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer(folder)


def test_the_token_of_every_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make_model(tmp_path / "a"))
    assert tokenizer.vocab_size == len(WORDS)
    assert tokenizer.tokens() == dict(enumerate(WORDS))
