"""The addition task's character tokenizer as Hugging Face files.

    tokenizer.json          the tokenizer itself; `tokenizers.Tokenizer.from_file` needs nothing else
    tokenizer_config.json   what `transformers.AutoTokenizer` adds: special tokens and the chat template

Ids: 0 <pad>, 1 <bos>, 2 <eos>, 3..16 the characters, 17 <unk>; the models' tables are padded to 32 rows.
Encoding a prompt gives <bos> and its characters: the post-processor inside tokenizer.json puts <bos> there, so both
libraries agree. The chat template renders a user message as <bos> and its text: encoded without more special tokens,
it has the same ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from task import ALPHABET
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
#: Rows of the embedding table; a multiple of 32 splits evenly over tensor-parallel ranks.
VOCAB_SIZE = 32

CHAT_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{ message['content'] }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


def build_tokenizer(alphabet: str = ALPHABET) -> Tokenizer:
    """Build the tokenizer: one token a character, <bos> in front, characters outside the alphabet become <unk>."""
    # <unk> rather than an error: servers warm up with an English sentence of their own
    vocab = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet, UNK])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS, UNK)])
    return tokenizer


def save_tokenizer(directory: Path, alphabet: str = ALPHABET) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing directory."""
    build_tokenizer(alphabet).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "model_max_length": 128,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
