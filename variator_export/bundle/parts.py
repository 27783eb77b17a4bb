"""Parts of a model: the piece that one graph computes, with its inputs and outputs.

An encoder has one part, `model`. A model that generates text has `encoder_model`, whose graph is a variant's
own, and `decoder_with_past_model`, one graph for all variants whose decoder has the same layers (names of
Optimum).
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from variator_export.core.axes import LENGTH
from variator_export.core.parts import ENCODER, MODEL

T = TypeVar("T")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Entry):
    """An input or an output of a part.

    Attributes:
        dtype: The element type, as named by numpy.
        axes: The names of the dimensions; a number where the size is fixed.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class PartEntry(_Entry):
    """One part of a model.

    Attributes:
        inputs: Named inputs, without the plugin inputs.
        outputs: Named outputs, in order.
        feeds: The output of this or another part that feeds an input, as `PART.OUTPUT` by input name.
        num_sites: The number of feed-forward networks in this part that a plugin wraps.
    """

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    feeds: dict[str, str] = Field(default_factory=dict)
    num_sites: int = 0

    def without(self, names: Collection[str]) -> "PartEntry":
        """The part without some inputs and outputs."""
        return self.model_copy(
            update={
                "inputs": tuple(tensor for tensor in self.inputs if tensor.name not in names),
                "outputs": tuple(tensor for tensor in self.outputs if tensor.name not in names),
                "feeds": {name: source for name, source in self.feeds.items() if name not in names},
            }
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """The input names, in the order of the graph."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The output names, in order."""
        return tuple(tensor.name for tensor in self.outputs)

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """The outputs with one row per token."""
        return tuple(tensor.name for tensor in self.outputs if LENGTH in tensor.axes)


def plugin_part(parts: Collection[str]) -> str:
    """The part that plugins are in."""
    return ENCODER if ENCODER in parts else MODEL


def with_plugins(parts: Mapping[str, T]) -> T:
    """The entry for the part that plugins are in."""
    return parts[plugin_part(parts)]


def graph_name(variant: str, part: str) -> str:
    """The file name of a variant's graph of a part: `ratio-4.onnx`, or `ratio-4_encoder_model.onnx`."""
    return f"{part_name(variant, part)}.onnx"


def part_name(variant: str, part: str) -> str:
    """The name of a variant's part in files and reports; a one-part model uses the variant's name alone."""
    return variant if part == MODEL else f"{variant}_{part}"
