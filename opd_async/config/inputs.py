"""What a user brings: the sections `models` and `data` of a topology."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd_async.config.section import FilePath, HookName, Section, TeacherName


class ModelSection(Section):
    """A Hugging Face checkpoint: a folder, or a name of the hub."""

    path: FilePath
    """The folder: `config.json`, `tokenizer.json`, `*.safetensors`. Where it is none here, a name of the hub such as
    `Qwen/Qwen3-8B`, which is fetched into its cache. All models of a run have one vocabulary."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Null: the main branch."""


class ModelsSection(Section):
    """The student and its teachers. They must share one vocabulary."""

    student: ModelSection
    """The model that is trained."""
    teacher: ModelSection | None = None
    """The model that scores. Needed where it runs on engines, unless there are several."""
    teachers: dict[TeacherName, ModelSection] = Field(default_factory=dict)
    """Several teachers by name, instead of one. `data.teacher_key` says whose a prompt is."""


class PromptsSection(Section):
    """A prompts file (JSONL or parquet) and the names of its keys."""

    path: FilePath
    """The file: JSONL or parquet, one prompt a row."""
    prompt_key: str = "prompt"
    """Key of the prompt: text, or a list of chat messages."""
    label_key: str = "label"
    """Key of the right answer. Evaluations and rules of a reward compare responses with it."""
    metadata_key: str = "metadata"
    """Key of a mapping that goes to `reward.function` unread. It may hold `data.teacher_key`."""


class CompletionsSection(Section):
    """A file (JSONL or parquet) of prompts with a response each, and the names of its keys."""

    path: FilePath
    """The file: JSONL or parquet, a prompt and a response a row."""
    prompt_key: str = "prompt"
    """Key of the prompt: text, or a list of chat messages."""
    completion_key: str = "completion"
    """Key of the response, text."""
    metadata_key: str = "metadata"
    """Key of a mapping. It may hold `data.teacher_key`."""


class DataSection(Section):
    """Prompts to train on, and prompts held out for evaluation."""

    train: PromptsSection | None = None
    """Prompts to train on: a file. Null: those of `function`."""
    function: HookName | None = None
    """`module:name` of a function that returns the prompts to train on, in the place of `train`: a sequence or an
    iterator of rows with `prompt`, `label` and `metadata`."""
    held_out: PromptsSection | None = None
    """Prompts of the evaluations. Null: no evaluation."""
    completions: CompletionsSection | None = None
    """Responses to distil on beside the student's own. `opd.gkd_lambda` is the student's share."""
    shuffle: bool = True
    """Draw a new order of the prompts for each epoch, from `seed`. False: in the order of the file."""
    chat_template: FilePath | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    teacher_key: str | None = None
    """Several teachers: the key in a prompt's metadata that names its teacher."""
    teacher_prompt: str | None = None
    """What a teacher reads in place of the student's prompt: a key of the row that holds a prompt, or a Jinja template
    over the row (docs/learning.md). Null: what the student reads."""
    privileged_key: str | None = None
    """Key of the row, or of its metadata, with text that only a teacher is shown: `privileged` in the template, behind
    the student's prompt without one."""
    teacher_prompt_missing: Literal["refuse", "plain"] = "refuse"
    """Rows that lack what their teacher's prompt is made of: refused before the start, or trained plainly."""

    @property
    def informs_teachers(self) -> bool:
        """True if teachers read other prompts than the student."""
        return self.teacher_prompt is not None or self.privileged_key is not None
