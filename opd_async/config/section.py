"""What every section of a topology is made of: the base class, and numbers with bounds and units."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1, json_schema_extra={"unit": "tokens"})]
Steps = Annotated[int, Field(ge=1, json_schema_extra={"unit": "steps"})]
StepsOr0 = Annotated[int, Field(ge=0, json_schema_extra={"unit": "steps"})]
Seconds = Annotated[float, Field(gt=0, json_schema_extra={"unit": "s"})]
Milliseconds = Annotated[float, Field(ge=0, json_schema_extra={"unit": "ms"})]
Mebibytes = Annotated[int, Field(ge=1, json_schema_extra={"unit": "MiB"})]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", examples=["cpu", "cuda:0"])]
Devices = Annotated[tuple[Device, ...], Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+/?$", examples=["http://127.0.0.1:30000"])]
HookName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["my_module:my_function"])]
"""A function of the user's own (`opd_async.hooks`)."""
Label = Annotated[str, Field(pattern=r"^[^/\\#?%:]+$", examples=["sums"])]
"""What something is called in a tracker, and in the name of a file."""
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

AUTO = "auto"
"""What a user writes for a size that the program shall choose."""


class Auto(int):
    """A size that is still to be chosen (`opd_async.forecast.sizes`); until then it counts as this number."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Written as the word that a user would write, also as a default in the schema."""
        written = core_schema.plain_serializer_function_ser_schema(lambda _: AUTO)
        return core_schema.is_instance_schema(cls, serialization=written)


@dataclass(frozen=True, slots=True)
class OrAuto:
    """Annotation of a whole number that may be `auto` as well, which is read as `Auto(stand_in)`."""

    stand_in: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read `auto`, keep what is `Auto` already, and leave the rest to the number's own schema."""

        def read(value: Any, check: Callable[[Any], Any]) -> Any:
            if value == AUTO:
                return Auto(self.stand_in)
            return value if isinstance(value, Auto) else check(value)

        def write(value: int) -> int | str:
            return AUTO if isinstance(value, Auto) else value

        written = core_schema.plain_serializer_function_ser_schema(write)
        return core_schema.no_info_wrap_validator_function(read, handler(source), serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Say that a number may stand here, or the word."""
        assert schema["type"] == "function-wrap"
        return {"anyOf": [handler(schema["schema"]), {"const": AUTO}]}


_VARIABLE = re.compile(r"\$\{(\w+)\}")
_PRINTABLE = 32


def _expanded(path: Path) -> Path:
    """Put in `~` at the start and `${NAME}` anywhere, as a shell would. Raises `ValueError` with what is wrong."""
    text = str(path)
    if any(ord(one) < _PRINTABLE for one in text):
        raise ValueError(f"{text!r} holds a control character; write the path without it")
    if unset := [name for name in _VARIABLE.findall(text) if name not in os.environ]:
        raise ValueError(f"{text} names the variable {unset[0]}, which is not set; set it, or write the path itself")
    try:
        return Path(_VARIABLE.sub(lambda found: os.environ[found[1]], text)).expanduser()
    except RuntimeError:
        raise ValueError(f"{text} begins with the home folder of nobody; write the path itself") from None


FilePath = Annotated[Path, AfterValidator(_expanded)]
"""A path in which `~` and `${NAME}` stand for the home folder and for a variable of the environment."""
ONE_PATH, SEVERAL_PATHS = "<a path>", "<a list of paths>"
FORMS = frozenset((ONE_PATH, SEVERAL_PATHS))
"""What pydantic puts into the place of an error, behind the key that may have one of these forms."""


def _form(value: Any) -> str:
    return SEVERAL_PATHS if isinstance(value, list | tuple) else ONE_PATH


FilePaths = Annotated[
    Annotated[FilePath, Tag(ONE_PATH)] | Annotated[tuple[FilePath, ...], Field(min_length=1), Tag(SEVERAL_PATHS)],
    Discriminator(_form),
]
"""One path, or several."""


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors, infinities and NaN are not numbers.

    The text below a key is its description in the schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, /, **values: Any) -> None:  # a section may have a key `self`
        """Build a section in code. Raises `InputError` with every problem, in the words that a file would get."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            from opd_async.config.topology_file import refuse_section  # it knows the sections

            refuse_section(type(self), error)
            raise

    # as pydantic marks its own: data that it validates itself does not come through here
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
