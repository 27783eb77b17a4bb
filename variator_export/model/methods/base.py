"""What a method has to say about itself: how a variant of it is made, run, and counted.

A method makes variants of a backbone. One file per method, entered in `methods/__init__.py`, or in another
distribution by an entry point.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.core.registry import resolve
from variator_export.model.encoder_size import EncoderSize

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from variator_export.model.backbone import Backbone

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A way to make variants of a backbone.

    What needs torch or onnx-ir is named as `module:function` and imported when it is called: a session asks
    for inputs and shapes where neither is installed.

    Attributes:
        name: How recipes and manifests call it.
        is_baseline: Whether its variants are the backbone itself, which everything else is compared with.
        tensors: The files, below a variant's own folder, that its graphs point into.
        graph_inputs: The inputs of the graph for all variants that make it run one (the backbone's sizes, the
            variant's folder).
        graph_input_shapes: The shapes of those inputs that are not the same for all variants.
        shape_label: What tells variants of other shapes apart, in the names of optimization profiles.
        macs: Multiply-accumulates of one call by formula (sizes, variant, batch_size, tokens).
        module: `module:function` of (backbone, the variant's folder): the eager model, a module from inputs
            to outputs by name that has the transformers model inside as `transformer`.
        binder: `module:function` of (the graph for all, the variant's folder inside the bundle): the
            variant's own graph.
    """

    name: str
    is_baseline: bool
    tensors: tuple[str, ...]
    graph_inputs: Callable[[EncoderSize, Path], dict[str, np.ndarray]]
    graph_input_shapes: Callable[[BackboneEntry, Variant], Shapes]
    shape_label: Callable[[Variant], str]
    macs: Callable[[EncoderSize, Variant, int, int], int]
    module: str
    binder: str

    def inputs_of(self, bundle: BundleFiles, variant: Variant) -> dict[str, np.ndarray]:
        """`graph_inputs` of a bundle's variant, after the hashes of its own files were compared."""
        size = EncoderSize(**bundle.manifest.backbone.encoder_size)
        return self.graph_inputs(size, bundle.variant_folder(variant))

    def eager(self, backbone: "Backbone", folder: Path) -> "nn.Module":
        """The eager model of a variant.

        Args:
            backbone: The loaded backbone; left as it is.
            folder: Where the variant's own files are.
        """
        made: nn.Module = self._call(self.module, backbone, folder)
        return made

    def bind(self, graph_for_all: Path, folder: str) -> "ir.Model":
        """The graph of a variant.

        Args:
            graph_for_all: The graph that runs every variant, in the bundle's folder.
            folder: The variant's own folder inside the bundle.
        """
        model: ir.Model = self._call(self.binder, graph_for_all, folder)
        return model

    def _call(self, function: str, *arguments: Any) -> Any:
        return resolve(function)(*arguments)
