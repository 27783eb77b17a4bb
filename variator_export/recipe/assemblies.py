"""Modules and assemblies in recipes."""

from typing import Annotated, Any

from pydantic import BeforeValidator, StringConstraints, field_validator

from variator_export.core.assembly import parse_assembly
from variator_export.core.errors import UserError
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
    """A variant whose layers are original ones and modules.

    In a list of assemblies, a specification alone is short for `{spec: …}`.
    """

    spec: str
    """`enc=2,2,1x8;dec=6,6`: how many original layers each layer stands for, in order, for each stack; `;k=4`
    adds the compression plugin of ratio 4."""
    name: VariantName | None = None
    """The variant's name; None for one made of the specification, such as `enc-2x3_ratio-4`."""
    plugin: VariantName | None = None
    """The name of the plugin, where several plugins have the ratio of the specification."""

    @field_validator("spec")
    @classmethod
    def _is_a_specification(cls, value: str) -> str:
        try:
            parse_assembly(value)
        except UserError as error:
            raise ValueError(f"{error.message} {error.hint or ''}".strip()) from error
        return value


def _from_text(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str) else value


Assemblies = tuple[
    Annotated[AssemblyRecipe, BeforeValidator(_from_text, json_schema_input_type=str | AssemblyRecipe)],
    ...,
]
