"""What every section of a topology is made of: the base class, and numbers with bounds and units."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
Device = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$", examples=["cpu", "cuda:0"])]
Devices = Annotated[tuple[Device, ...], Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+/?$", examples=["http://127.0.0.1:30000"])]
HookName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["my_module:my_function"])]
"""A function of the user's own (`opd_async.hooks`)."""
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors, infinities and NaN are not numbers.

    The text below a key is its description in the schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        """Build a section in code. Raises `InputError` with every problem, in the words that a file would get."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            from opd_async.config.topology_file import refuse_section  # it knows the sections

            refuse_section(type(self), error)
            raise

    # as pydantic marks its own: data that it validates itself does not come through here
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
