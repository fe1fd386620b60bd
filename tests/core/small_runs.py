"""Model folders, prompts files and topologies small enough to make for every test."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.decoder import read_shape
from opd_async.data.decoder_tensors import decoder_tensors
from opd_async.errors import InputError

WORDS = ["<pad>", "<bos>", "<eos>", *"abcdefghij", *"0123456789"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}\n{{ message['role'][0] }}{{ message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def make_model(folder: Path, words: list[str] = WORDS, **config: Any) -> Path:
    """A complete checkpoint folder: one letter is one token, `<bos>` is added in front."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 8,
        "head_dim": 4,
        "intermediate_size": 12,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 2,
    }
    write_json(folder / "config.json", sizes | config)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 5]})
    special = {"bos_token": "<bos>", "eos_token": {"__type": "AddedToken", "content": "<eos>"}, "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | special,
    )
    make_weights(folder)
    return folder


def make_weights(folder: Path) -> None:
    """The weights that `config.json` asks for, all zero; one that no learner takes gets a single tensor."""
    try:
        tensors = decoder_tensors(read_shape(folder))
    except InputError:
        tensors = {"weight": (4, 4)}
    header, end = {}, 0
    for name, size in tensors.items():
        start, end = end, end + 4 * math.prod(size)
        header[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)  # the zeros of large models take no room


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def topology_data(root: Path) -> dict[str, Any]:
    """A valid topology as data, with the files that it names made below `root`."""
    for side in ("student", "teacher"):
        make_model(root / side)
    write_lines(root / "train.jsonl", {"prompt": "abc", "label": "1"}, {"prompt": "ab", "label": "2"})
    engine = {"context_tokens": 64, "kv_tokens": 1024, "max_running": 16}
    return {
        "name": "small",
        "run_dir": str(root / "runs"),
        "models": {side: {"path": str(root / side)} for side in ("student", "teacher")},
        "data": {"train": {"path": str(root / "train.jsonl")}},
        "schedule": {"steps": 10, "tokens_per_step": 64, "samples_per_step": 8},
        "engines": {"student": dict(engine), "teacher": dict(engine)},
        "rollout": {"slots": 8, "sampling": {"max_response_tokens": 32}},
    }


def write_topology(root: Path, data: dict[str, Any]) -> Path:
    path = root / "topology.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def small_topology(root: Path, *overrides: str) -> Topology:
    """A valid topology, with `--set` overrides."""
    return load_topology(write_topology(root, topology_data(root)), overrides)
