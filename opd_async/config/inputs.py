"""What a user brings: the sections `models` and `data` of a topology."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from opd_async.config.section import FilePath, FilePaths, HookName, Section, TeacherName


class ModelSection(Section):
    """A Hugging Face checkpoint: a folder, a name of the hub, or a GGUF file."""

    path: FilePath
    """The folder: `config.json`, `tokenizer.json`, `*.safetensors`. Where it is none here, a name of the hub such as
    `Qwen/Qwen3-8B`, which is fetched into its cache; a `*.gguf` file is made into a folder once. The tokenizers of all
    models of a run agree."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Null: the main branch."""


class ModelsSection(Section):
    """The student and its teachers. An id that the student can sample must stand for the same token in all of them."""

    student: ModelSection
    """The model that is trained."""
    teacher: ModelSection | None = None
    """The model that scores. Needed where it runs on engines, unless there are several."""
    teachers: dict[TeacherName, ModelSection] = Field(default_factory=dict)
    """Several teachers by name, instead of one. `data.teacher_key` says whose a prompt is."""
    allow_token_differences: tuple[str, ...] = ()
    """Tokens by which the tokenizers of student and teachers may differ: either side's name of each. Such an id is
    scored as what it is for the teacher."""


class PromptsSection(Section):
    """Prompts files (JSONL or parquet) and the names of their keys."""

    path: FilePaths
    """JSONL (also `.jsonl.gz`) or parquet, one prompt a row: a file, a folder, a pattern, a list of these, or a data
    set of the hub, `hf://owner/name`."""
    subset: str | None = None
    """Of a data set of the hub: which of its subsets (`datasets` calls it the name of a config)."""
    split: str | None = None
    """Of a data set of the hub: which split, such as `test`, or a part such as `train[:1000]`. Null: `train`."""
    revision: str | None = None
    """Of a data set of the hub: branch, tag or commit. Null: the main branch."""
    prompt_key: str = "prompt"
    """Key of the prompt: text, or a list of chat messages. Dots lead into objects, here and in the other keys."""
    label_key: str = "label"
    """Key of the right answer. Evaluations and rules of a reward compare responses with it."""
    tools_key: str | None = "tools"
    """Key of the tools that the chat template is told of, a list of objects. Null: none are read."""
    metadata_key: str = "metadata"
    """Key of a mapping that goes to `reward.function` unread. It may hold `data.teacher_key`."""


class CompletionsSection(Section):
    """Files (JSONL or parquet) of prompts with a response each, and the names of their keys."""

    path: FilePaths
    """JSONL (also `.jsonl.gz`) or parquet, a prompt and a response a row: a file, a folder, a pattern, a list,
    or a data set of the hub, `hf://owner/name`."""
    subset: str | None = None
    """Of a data set of the hub: which of its subsets (`datasets` calls it the name of a config)."""
    split: str | None = None
    """Of a data set of the hub: which split, such as `test`, or a part such as `train[:1000]`. Null: `train`."""
    revision: str | None = None
    """Of a data set of the hub: branch, tag or commit. Null: the main branch."""
    prompt_key: str = "prompt"
    """Key of the prompt: text, or a list of chat messages."""
    completion_key: str = "completion"
    """Key of the response: text, or a list with one message of the assistant."""
    tools_key: str | None = "tools"
    """Key of the tools that the chat template is told of, a list of objects. Null: none are read."""
    metadata_key: str = "metadata"
    """Key of a mapping. It may hold `data.teacher_key`."""


class DataSection(Section):
    """Prompts to train on, and prompts held out for evaluation."""

    train: PromptsSection | None = None
    """Prompts to train on: a file. Null: those of `function`."""
    function: HookName | None = None
    """`module:name` of a function that returns the prompts to train on, in the place of `train`: a sequence or an
    iterator of rows with `prompt`, `label`, `tools` and `metadata`."""
    held_out: PromptsSection | None = None
    """Prompts of the evaluations. Null: no evaluation."""
    completions: CompletionsSection | None = None
    """Responses to distil on beside the student's own. `opd.gkd_lambda` is the student's share."""
    shuffle: bool = True
    """Draw a new order of the prompts for each epoch, from `seed`. False: in the order of the file."""
    chat_template: FilePath | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Names that the chat template sees, such as `enable_thinking: false`. It must use every one of them."""
    system_prompt: str | None = None
    """First message of every chat that has no system message of its own."""
    as_chat: bool = False
    """Make a prompt that is a plain text one message of the user, which goes through the chat template."""
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
    contrast_prompt: str | None = None
    """What the teacher reads beside its prompt, to score the same responses a second time, a wrong hint perhaps: a key
    or a template as for `teacher_prompt`. Those scores are `contrast_R` of `opd.function`. Null: none are made."""

    @property
    def informs_teachers(self) -> bool:
        """True if teachers read other prompts than the student."""
        own = (self.teacher_prompt, self.privileged_key, self.contrast_prompt)
        return any(one is not None for one in own)
