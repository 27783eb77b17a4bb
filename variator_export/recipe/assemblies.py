"""Modules and assemblies in recipes."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from variator_export.core.assembly import parse_assembly
from variator_export.core.errors import UserError
from variator_export.core.sizes import parse_size
from variator_export.recipe.part import RecipeModel as _Part

VARIANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
VariantName = Annotated[str, StringConstraints(pattern=VARIANT_NAME)]


class ModulesRecipe(_Part):
    """A folder of modules: layers that each do the work of several."""

    name: VariantName | None = None
    """The folder's name in the bundle; None for the name it has."""
    source: str
    """A folder with `module_config.json` and `modules.safetensors`;
    `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`; or `recipes:PATH` for modules of the package."""


class AssemblyRecipe(_Part):
    """A variant whose layers are original ones and modules: written out, or found by a strategy.

    In a list of assemblies, a specification alone is short for `{spec: …}`.
    """

    spec: str | None = None
    """`enc=2,2,1x8;dec=6,6`: how many original layers each layer stands for, in order, for each stack; `;k=4`
    adds the compression plugin of ratio 4."""
    strategy: Literal["size-first", "speed-first"] | None = None
    """Instead of a specification: `size-first` reads the fewest weights, `speed-first` takes the least measured
    time, the decoder first; within the budget below."""
    speedup: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """The budget: how many times as fast as the original, by measured times of its parts."""
    max_weights: Annotated[str | int, WithJsonSchema({"type": ["string", "integer"]})] | None = None
    """The budget: the most bytes of weights that the assembly may read, such as `150MB`."""
    name: VariantName | None = None
    """The variant's name; None for one made of the specification, such as `enc-2x3_ratio-4`."""

    @field_validator("spec")
    @classmethod
    def _is_a_specification(cls, value: str | None) -> str | None:
        if value is not None:
            _checked(parse_assembly, value)
        return value

    @field_validator("max_weights")
    @classmethod
    def _is_a_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            _checked(parse_size, value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "AssemblyRecipe":
        budget = self.speedup is not None or self.max_weights is not None
        if (self.spec is None) == (self.strategy is None):
            raise ValueError("an assembly has either a spec or a strategy")
        if budget != (self.strategy is not None):
            raise ValueError("a strategy needs a budget, speedup or max_weights; a spec has none")
        if self.speedup is not None and self.max_weights is not None:
            raise ValueError("give one budget: speedup or max_weights")
        return self


def _checked(parse: Any, value: Any) -> None:
    try:
        parse(value)
    except UserError as error:
        raise ValueError(f"{error.message} {error.hint or ''}".strip()) from error


def _from_text(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str) else value


Assemblies = tuple[
    Annotated[AssemblyRecipe, BeforeValidator(_from_text, json_schema_input_type=str | AssemblyRecipe)],
    ...,
]
