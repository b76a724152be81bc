"""The base of all that is read from a spec."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
