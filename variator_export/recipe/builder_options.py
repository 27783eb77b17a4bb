"""Options of an engine builder: the only place where an option is declared.

A recipe has the options among its `engine` keys. A builder request and an engine's sidecar hold them as one
object.
"""

from typing import Annotated, Literal

from pydantic import Field

from variator_export.recipe.part import RecipeModel


class BuilderOptions(RecipeModel):
    """Options of an engine builder, besides the graph, its shapes and the GPU."""

    tf32: bool = False
    """Whether float32 products may be computed in TF32. Eager PyTorch does not by default."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """The effort that the builder spends on finding fast kernels, 0 to 5; None for the builder's default."""
    workspace_mib: Annotated[int, Field(ge=1)] | None = None
    """The maximum workspace memory of a layer, in MiB; None for all of the GPU's memory."""
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    """`tensorrt` only: the other GPUs that an engine may run on, besides the one that builds it."""
    version_compatible: bool = False
    """`tensorrt` only: whether later TensorRT versions may run an engine, with the lean runtime of the
    version that built it (`--lean-runtime`). Not together with `strip_weights`."""
    strip_weights: bool = False
    """`tensorrt` only: leave the weights out of the engines. A session loads the bundle's weights into an
    engine, so many engines share one weight file."""
