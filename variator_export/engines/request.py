"""What an engine is built of and for, as it travels to the process that builds it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from variator_export.bundle.manifest import BackboneEntry
from variator_export.bundle.parts import PartEntry
from variator_export.core.axes import BATCH, LENGTH
from variator_export.core.errors import UserError
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX
from variator_export.recipe.builder_options import BuilderOptions
from variator_export.recipe.recipe import ShapeSet

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt, max
TimingCacheMode = Literal["ignore", "use", "require"]


class Profile(BaseModel):
    """An optimization profile: the shapes of every input, as (min, opt, max).

    Attributes:
        name: Of the set of shapes; in an engine for every ratio with the ratio before it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    shapes: dict[str, Shapes]

    def __str__(self) -> str:
        ends = {
            tuple(shapes) for name, shapes in self.shapes.items() if not name.startswith(GRAPH_INPUT_PREFIX)
        }
        words = ("x".join(map(str, shape)) for shapes in sorted(ends) for shape in shapes)
        return f"{self.name} ({', '.join(words)})"

    def covers(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether it is for these shapes of inputs."""
        return all(
            len(shapes[name]) == len(low)
            and all(a <= s <= b for a, s, b in zip(low, shapes[name], high, strict=True))
            for name, (low, _, high) in self.shapes.items()
        )


class EngineRequest(BaseModel):
    """An engine to build.

    Attributes:
        target: `tensorrt-rtx` or `tensorrt`.
        graph: The ONNX file, relative to the folder of the process.
        what: How messages call it, for example `ratio-4`.
        profiles: In the order in which the engine numbers them.
        options: How to build it.
        compute_capabilities: `sm89`; none: all that the target knows.
        timing_cache: The file of kernels' times; None: none.
    """

    model_config = ConfigDict(frozen=True)

    target: str
    graph: str
    what: str
    profiles: tuple[Profile, ...]
    options: BuilderOptions = BuilderOptions()
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: str | None = None
    timing_cache_mode: TimingCacheMode = "ignore"


def request_of(
    sidecar: Mapping[str, Any], graph: str, what: str, profiles: Sequence[Profile]
) -> EngineRequest:
    """The request that an engine was built by, for another graph; its weights are left in.

    Args:
        sidecar: Of the engine.
        graph: The ONNX file.
        what: How messages call the new engine.
        profiles: Its profiles.
    """
    named = sidecar["compute_capabilities"]
    return EngineRequest(
        target=sidecar["target"],
        graph=graph,
        what=what,
        profiles=tuple(profiles),
        options=BuilderOptions.model_validate({**sidecar["options"], "strip_weights": False}),
        compute_capabilities=tuple(named),
    )


def variant_profiles(sets: Mapping[str, ShapeSet], backbone: BackboneEntry, part: PartEntry) -> list[Profile]:
    """The profiles of an engine of one variant: one for each set of shapes.

    Raises:
        UserError: A set begins beyond the model's limit.
    """
    return [
        Profile(name=name, shapes=_token_shapes(name, shapes, backbone, part))
        for name, shapes in sets.items()
    ]


def any_ratio_profiles(
    sets: Mapping[str, ShapeSet],
    backbone: BackboneEntry,
    part: PartEntry,
    variants: Mapping[str, Mapping[str, Sequence[int]]],
) -> list[Profile]:
    """The profiles of an engine that runs every variant: one for each set of shapes and shapes of variants.

    Args:
        sets: By name.
        backbone: The backbone.
        part: The part of it that the engine is of.
        variants: The shapes of the inputs that carry a variant (`Method.graph_input_shapes`), by a label.
            Variants of equal shapes share a profile.
    """
    profiles = []
    for label, inputs in variants.items():
        fixed = {name: (tuple(shape),) * 3 for name, shape in inputs.items()}
        for name, shapes in sets.items():
            tokens = _token_shapes(name, shapes, backbone, part)
            profiles.append(Profile(name=f"{label} {name}", shapes={**tokens, **fixed}))
    return profiles


def _token_shapes(name: str, shapes: ShapeSet, backbone: BackboneEntry, part: PartEntry) -> dict[str, Any]:
    """The shapes of a part's own inputs, within the model's limit."""
    limit, lengths = backbone.max_length, shapes.sequence_length
    if limit is not None and lengths[0] > limit:
        raise UserError(
            f"The profile {name} begins at {lengths[0]} tokens; the model's limit is {limit}.",
            f"Correct engine.profiles.{name}.sequence_length in the recipe.",
        )
    sizes = {BATCH: shapes.batch_size, LENGTH: tuple(map(backbone.within_limit, lengths))}
    found = {}
    for tensor in part.inputs:
        axes = [sizes[axis] if isinstance(axis, str) else (axis,) * 3 for axis in tensor.axes]
        found[tensor.name] = tuple(zip(*axes, strict=True))
    return found
