"""The description of a method: everything needed to build, run and count the MACs of its variants.

A method makes variants of a backbone. Each method has one file and is registered in `methods/__init__.py`, or
through an entry point of another distribution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.bundle.branches import BRANCHES_INPUT
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.bundle.variant_files import (
    MODULE_TENSORS_NAME,
    QUANTIZED_MODULES_NAME,
    VariantFiles,
)
from variator_export.core.axes import InputShapes
from variator_export.core.encoder_size import EncoderSize
from variator_export.core.precision import find_precision
from variator_export.core.registry import resolve

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from variator_export.model.backbone import Backbone
    from variator_export.model.backbone_info import BackboneInfo


@dataclass(frozen=True)
class Method:
    """A way to make variants of a backbone.

    Functions that need torch or onnx-ir are named as `module:function` and imported when they are called,
    because a session needs inputs and shapes where neither package is installed.

    Attributes:
        name: Name of the method in recipes and manifests.
        is_baseline: Whether the method's variants are the backbone itself, with which all other variants are
            compared.
        tensors: Files in the folder of a variant's plugin that the variant's graphs refer to.
        graph_inputs: Function of (the backbone's sizes, the variant's files). Returns the inputs for the
            variant's plugin of the graphs that take plugins as inputs.
        graph_input_shapes: Function of (backbone, variant). Returns the shapes of the graph inputs whose
            shape depends on the variant.
        shape_label: Function of a variant. Returns a label that distinguishes variants with different shapes,
            for the names of optimization profiles.
        macs: Function of (sizes, variant, batch_size, tokens). Returns the multiply-accumulates of one call
            by formula.
        module: `module:function` of (backbone, the variant's files). Returns the eager model: a module that
            maps inputs to outputs by name and exposes the underlying transformers model as `transformer`.
        binder: `module:function` of (the graph of the original layers that takes plugins as inputs, the
            variant's files, the backbone's `BackboneInfo`). Returns the variant's own graph.
    """

    name: str
    is_baseline: bool
    tensors: tuple[str, ...]
    graph_inputs: Callable[[EncoderSize, VariantFiles], dict[str, np.ndarray]]
    graph_input_shapes: Callable[[BackboneEntry, Variant], InputShapes]
    shape_label: Callable[[Variant], str]
    macs: Callable[[EncoderSize, Variant, int, int], int]
    module: str
    binder: str

    def inputs_of(self, bundle: BundleFiles, variant: Variant, graph: str) -> dict[str, np.ndarray]:
        """Check the hashes of a variant's own files and return the inputs with which a graph runs it.

        Args:
            bundle: The bundle.
            variant: The variant.
            graph: One of the graphs that take plugins as inputs (`Manifest.shared_graphs`).
        """
        manifest, files = bundle.manifest, bundle.variant_files(variant)
        size, has_branches = manifest.backbone.encoder_size, graph == manifest.any_assembly_graph
        return self.shared_graph_inputs(size, files, has_branches=has_branches)

    def shared_graph_inputs(
        self, size: EncoderSize, files: VariantFiles, *, has_branches: bool
    ) -> dict[str, np.ndarray]:
        """The inputs with which a graph that takes plugins as inputs runs a variant.

        Args:
            size: The backbone's sizes.
            files: The variant's files.
            has_branches: Whether the graph runs every assembly.
        """
        inputs = self.graph_inputs(size, files)
        if has_branches:
            assert files.switches is not None
            inputs |= {BRANCHES_INPUT: files.switches}
        return inputs

    def tensor_files(self, variant: Variant, precision: str) -> tuple[str, ...]:
        """The files of a bundle that a variant's own graph refers to, besides the backbone's weights.

        Args:
            variant: The variant.
            precision: The bundle's precision.
        """
        plugin = () if variant.plugin is None else self.tensors
        modules = QUANTIZED_MODULES_NAME if find_precision(precision).quantizes else MODULE_TENSORS_NAME
        return (
            *(f"{variant.plugin.folder}/{name}" for name in plugin if variant.plugin is not None),
            *(f"modules/{name}/{modules}" for name in variant.modules),
        )

    def eager(self, backbone: "Backbone", files: VariantFiles) -> "nn.Module":
        """Build the eager model of a variant.

        Args:
            backbone: The loaded backbone; left unchanged.
            files: The variant's own files.
        """
        made: nn.Module = self._call(self.module, backbone, files)
        return made

    def bind(self, any_ratio: Path, files: VariantFiles, info: "BackboneInfo") -> "ir.Model":
        """Build the graph of a variant.

        Args:
            any_ratio: The graph of the original layers that takes plugins as inputs, in the bundle's folder.
            files: The variant's own files.
            info: The backbone.
        """
        model: ir.Model = self._call(self.binder, any_ratio, files, info)
        return model

    def _call(self, function: str, *arguments: Any) -> Any:
        return resolve(function)(*arguments)
