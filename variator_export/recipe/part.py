"""What all parts of a recipe have in common."""

from pydantic import BaseModel, ConfigDict


class RecipePart(BaseModel):
    """Frozen; unknown keys are refused; a text behind a field is its description in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
