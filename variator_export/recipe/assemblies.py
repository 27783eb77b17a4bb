"""Modules, assemblies and strategies in recipes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from variator_export.core.assembly import parse_assembly
from variator_export.core.errors import UserError
from variator_export.core.strategy import parse_size
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
            raise ValueError(f"{error.message} {error.hint or ''}".strip(" .")) from error
        return value


class StrategyRecipe(_Part):
    """An assembly that is chosen for a budget, when it is built for the first time.

    Time is measured on ONNX Runtime on this machine, of requests that are one full text each.
    """

    strategy: Literal["speed-first", "size-first"] | None = None
    """What is chosen among assemblies that leave out equally few layers: the fastest (`speed-first`), or the
    one with the fewest stored weights (`size-first`). None for speed-first with `speedup`, or else
    size-first."""
    speedup: Annotated[float, Field(gt=1)] | None = None
    """How many times faster than the original it has to be at least."""
    max_weights: str | None = None
    """The stored weights that it has at most, such as `150MB`, in the precision of the bundle."""
    name: VariantName | None = None
    """The variant's name; None for one made of the strategy and the budget, such as `speed-first-2x`."""
    sequence_length: Annotated[int, Field(ge=1)] = 128
    """Tokens of a request."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens that are generated for it, of a model that generates text."""

    @field_validator("max_weights")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_size(value)
            except UserError as error:
                raise ValueError(f"{error.message} {error.hint or ''}".strip(" .")) from error
        return value

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.speedup is None and self.max_weights is None:
            raise ValueError("give a budget: speedup, max_weights, or both")
        return self

    @property
    def max_weight_bytes(self) -> int | None:
        """`max_weights` in bytes."""
        return None if self.max_weights is None else parse_size(self.max_weights)

    @property
    def resolved(self) -> "StrategyRecipe":
        """The same with the strategy and the name filled in."""
        strategy = self.strategy or ("speed-first" if self.speedup is not None else "size-first")
        budget = [] if self.speedup is None else [f"{self.speedup:g}x"]
        budget += [] if self.max_weights is None else [self.max_weights.replace(" ", "")]
        name = self.name or "-".join((strategy, *budget))
        return self.model_copy(update={"strategy": strategy, "name": name})


def _from_text(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str) else value


Assemblies = tuple[
    Annotated[AssemblyRecipe, BeforeValidator(_from_text, json_schema_input_type=str | AssemblyRecipe)],
    ...,
]
