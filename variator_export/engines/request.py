"""Requests to build an engine, in the form sent to the builder process."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from variator_export.bundle.manifest import BackboneEntry
from variator_export.bundle.parts import PartEntry
from variator_export.core.axes import BATCH, ENCODER_MASK, LENGTH, PAST_LENGTH, InputShapes
from variator_export.core.errors import UserError
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX
from variator_export.recipe.builder_options import BuilderOptions
from variator_export.recipe.recipe import ShapeSet

# Generated tokens per row that a decoder's engine is built for unless the recipe says otherwise: usually, at
# most.
NEW_TOKENS = (32, 128)
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt, max
TimingCacheMode = Literal["ignore", "use", "require"]
Attention = Literal["fused", "fused-float32", "decomposed"]


class Profile(BaseModel):
    """An optimization profile: the shapes of every input, as (min, opt, max).

    Attributes:
        name: Name of the set of shapes; an any-ratio engine puts a label of the variants before the name.
        shapes: Shapes by input.
        new_tokens: The most generated tokens of a row, for the engine of a decoder.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    shapes: dict[str, ShapeRange]
    new_tokens: int | None = None

    def __str__(self) -> str:
        ends = {
            tuple(shapes)
            for name, shapes in self.shapes.items()
            # A decoder takes one token of each row, with keys and values of four axes.
            if not name.startswith(GRAPH_INPUT_PREFIX) and (self.new_tokens is None or name == ENCODER_MASK)
        }
        words = ["x".join(map(str, shape)) for shapes in sorted(ends) for shape in shapes]
        if self.new_tokens is not None:
            words.append(f"up to {self.new_tokens} new tokens")
        return f"{self.name} ({', '.join(words)})"

    @property
    def is_fixed(self) -> bool:
        """Whether the profile is for one batch size and one length alone."""
        own = {name: ends for name, ends in self.shapes.items() if not name.startswith(GRAPH_INPUT_PREFIX)}
        return self.new_tokens is None and all(low == high for low, _, high in own.values())

    def covers(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether the profile covers these shapes of inputs."""
        return all(
            len(shapes[name]) == len(low)
            and all(a <= s <= b for a, s, b in zip(low, shapes[name], high, strict=True))
            for name, (low, _, high) in self.shapes.items()
        )


class EngineRequest(BaseModel):
    """An engine to build.

    Attributes:
        target: Name of the target that builds the engine.
        graph: The ONNX file, relative to the working folder of the builder process.
        what: Name of the engine in messages, for example `ratio-4`.
        profiles: Optimization profiles, in the order in which the engine numbers them.
        options: Options of the builder.
        compute_capabilities: GPUs to build for, for example `sm89`; if empty, the target's default.
        timing_cache: Path of the timing cache; None if there is none.
        timing_cache_mode: Use of the timing cache; `require` fails if a kernel time is missing.
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


class BuiltEngine(NamedTuple):
    """What a builder made of a request.

    Attributes:
        content: The serialized engine.
        attention: `fused` if each attention is one kernel; `fused-float32` if the graph was changed for that
            kernel to add products in float32; `decomposed` if the target has no such kernel for
            the graph, and computes attention in several; None if the builder does not tell, or the graph has
            no attention operators.
    """

    content: bytes
    attention: Attention | None = None


def request_of(
    sidecar: Mapping[str, Any], graph: str, what: str, profiles: Sequence[Profile]
) -> EngineRequest:
    """Repeat the request of an existing engine for another graph; the new engine keeps its weights.

    Args:
        sidecar: Sidecar of the existing engine.
        graph: The ONNX file.
        what: Name of the new engine in messages.
        profiles: Profiles of the new engine.
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
    """The profiles of an engine of one variant, or of a decoder: one for each set of shapes.

    Raises:
        UserError: A set starts beyond the model's limit.
    """
    return [
        Profile(
            name=name,
            shapes=_token_shapes(name, shapes, backbone, part),
            new_tokens=_new_tokens(shapes, backbone)[1] if _has_cache(part) else None,
        )
        for name, shapes in sets.items()
    ]


def any_ratio_profiles(
    sets: Mapping[str, ShapeSet],
    backbone: BackboneEntry,
    part: PartEntry,
    variants: Mapping[str, InputShapes],
) -> list[Profile]:
    """The profiles of an engine that runs every variant: one for each set of shapes and entry of `variants`.

    Args:
        sets: Sets of shapes by name.
        backbone: The backbone.
        part: The part of the backbone that the engine runs.
        variants: Shapes of the inputs that carry a variant (`Method.graph_input_shapes`), by label.
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
    """The shapes of a part's own inputs, cut to the model's limit."""
    limit, lengths = backbone.max_length, shapes.sequence_length
    if limit is not None and lengths[0] > limit:
        raise UserError(
            f"The profile {name} starts at {lengths[0]} tokens; the model's limit is {limit}.",
            f"Correct engine.profiles.{name}.sequence_length in the recipe.",
        )
    if not backbone.generates and (shapes.new_tokens, shapes.num_beams) != (None, None):
        raise UserError(
            f"The profile {name} has new_tokens or num_beams, and the model generates no text.",
            f"Leave them out of engine.profiles.{name} in the recipe.",
        )
    sizes = {BATCH: shapes.batch_size, LENGTH: tuple(map(backbone.clamp_length, lengths))}
    if _has_cache(part):
        low, opt, high = shapes.batch_size
        sizes[BATCH] = low, opt, high * (shapes.num_beams or 1)
        # Nothing is before the first token, and the last one is not read again.
        usual, most = _new_tokens(shapes, backbone)
        sizes[PAST_LENGTH] = 0, usual - 1, most - 1
    found = {}
    for tensor in part.inputs:
        axes = [sizes[axis] if isinstance(axis, str) else (axis,) * 3 for axis in tensor.axes]
        found[tensor.name] = tuple(zip(*axes, strict=True))
    return found


def _has_cache(part: PartEntry) -> bool:
    return any(PAST_LENGTH in tensor.axes for tensor in part.inputs)


def _new_tokens(shapes: ShapeSet, backbone: BackboneEntry) -> tuple[int, int]:
    """Generated tokens per row, usually and at most, cut to the model's limit."""
    limit = backbone.max_output_length
    usual, most = shapes.new_tokens or NEW_TOKENS
    return (usual, most) if limit is None else (min(usual, limit), min(most, limit))
