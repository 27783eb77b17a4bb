"""Parts of a model: what a graph does of it, and how it is called.

An encoder is one part, `model`. A model with two stacks has several (`encoder_model`,
`decoder_with_past_model`): a variant has a graph of each, or shares one with the others.
"""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from variator_export.core.axes import LENGTH
from variator_export.core.errors import UserError

# The part of a model that has no other.
MODEL = "model"
T = TypeVar("T")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Entry):
    """An input or an output of a part.

    Attributes:
        dtype: As numpy names it.
        axes: The names of its dimensions; a number where the size is fixed.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class PartEntry(_Entry):
    """One part.

    Attributes:
        inputs: Named inputs, without those that carry a plugin.
        outputs: Named outputs, in order.
        feeds: Which output of this or another part an input takes, as `PART.OUTPUT` by the input's name.
        num_sites: How many feed-forward networks of it a plugin is put around.
    """

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    feeds: dict[str, str] = Field(default_factory=dict)
    num_sites: int = 0

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order in which the graph has them."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """In order."""
        return tuple(tensor.name for tensor in self.outputs)

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """The outputs with one row per token."""
        return tuple(tensor.name for tensor in self.outputs if LENGTH in tensor.axes)


def only_part(parts: Mapping[str, T]) -> T:
    """What there is of the one part of a model.

    Raises:
        UserError: The model has several parts.
    """
    if MODEL not in parts:
        raise UserError(
            f"This needs a model of one part; the bundle's has the parts {', '.join(parts)}.",
            "Use a command or a method for models of several parts.",
        )
    return parts[MODEL]


def graph_name(variant: str, part: str) -> str:
    """The file of a variant's graph of a part: `ratio-4.onnx`, or `ratio-4_encoder_model.onnx`."""
    return f"{part_name(variant, part)}.onnx"


def part_name(variant: str, part: str) -> str:
    """How files and reports call a part of a variant; a model of one part needs no word for it."""
    return variant if part == MODEL else f"{variant}_{part}"
