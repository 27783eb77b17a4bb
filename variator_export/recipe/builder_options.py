"""The options of an engine's builder: the one place where a new one is declared.

A recipe has them among its `engine` keys; a request to a builder and an engine's sidecar hold them whole.
"""

from typing import Annotated, Literal

from pydantic import Field

from variator_export.recipe.part import RecipePart


class BuilderOptions(RecipePart):
    """What a builder is told besides the graph, its shapes and the GPU."""

    tf32: bool = False
    """Whether float32 products may be computed in TF32, as eager PyTorch does not by default."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """How long the builder looks for fast kernels, 0 to 5; None: its own default."""
    workspace_mib: Annotated[int, Field(ge=1)] | None = None
    """The most memory that a layer may use while it runs, in MiB; None: all of the GPU's."""
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    """`tensorrt` only: which other GPUs an engine may run on than the one that builds it."""
    version_compatible: bool = False
    """`tensorrt` only: whether later versions may run an engine. The lean runtime, a program of its own, is
    left out of it."""
    strip_weights: bool = False
    """`tensorrt` only: leave the weights out of the engines. A session puts the bundle's own into them, so
    many engines share one file of weights."""
