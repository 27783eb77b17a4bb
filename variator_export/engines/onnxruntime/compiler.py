"""Graphs for ONNX Runtime's TensorRT providers, which compile them when a session is opened.

A provider takes nothing but the graph and strings. So what an engine of this tool is built with has to be
said otherwise: float32 attention, for which TensorRT has no fused kernel, is written as the operators that it
consists of; profiles are strings; and the provider keeps the compiled engine for the next process.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from variator_export.core.environment import installed_version
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file, sha256_json
from variator_export.engines.cache_file import cache_file
from variator_export.engines.graph_file import load_without_defaults

if TYPE_CHECKING:  # code that runs graphs needs no pydantic
    from variator_export.engines.request import Profile

# Digits of a graph's hash in the name of a folder.
_DIGITS = 16


@dataclass(frozen=True)
class Compiler:
    """How a provider is told what an engine is built with.

    Attributes:
        prefix: First letters of the names of its options.
        cache: Names of the options that take the folder of a cache.
        enable: Options that use the caches.
        several: Options for more than one profile; None if the provider would stay on the first one.
    """

    prefix: str
    cache: tuple[str, ...]
    enable: Mapping[str, str]
    several: Mapping[str, str] | None

    def options(self, graph: "CompilableGraph", profiles: Sequence["Profile"]) -> dict[str, str]:
        """The options for a graph: its profiles, and a cache for the graph, its weights and the profiles.

        Raises:
            UserError: The folder of the cache cannot be created.
        """
        names = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-ep-nv-tensorrt-rtx-cu13")
        versions = {name: installed_version(name) for name in names}
        # The provider itself would take the engine of another model for this one.
        weights = [sha256_file(file) for file in graph.weights]
        shapes = _shapes(profiles) if profiles else {}
        key = sha256_json([hashlib.sha256(graph.content).hexdigest(), weights, shapes, versions])
        folder = cache_file("onnxruntime", self.prefix, key[:_DIGITS])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {folder} for compiled graphs cannot be created: {error}",
                "Set XDG_CACHE_HOME to a folder that can be written.",
            ) from error
        several = self.several if self.several is not None and len(profiles) > 1 else {}
        return {
            **{f"{self.prefix}_profile_{end}_shapes": text for end, text in shapes.items()},
            **several,
            **self.enable,
            **{name: str(folder) for name in self.cache},
        }


def _shapes(profiles: Sequence["Profile"]) -> dict[str, str]:
    """The profiles as ONNX Runtime's providers take them; an input stands once for each profile."""
    return {
        end: ",".join(
            f"{name}:{'x'.join(map(str, shapes[index]))}"
            for profile in profiles
            for name, shapes in profile.shapes.items()
        )
        for index, end in enumerate(("min", "opt", "max"))
    }


class CompilableGraph(NamedTuple):
    """A graph in memory.

    Attributes:
        content: The graph, which refers to its weights.
        weights: The files with the weights.
    """

    content: bytes
    weights: tuple[Path, ...]


def compilable(graph: Path) -> CompilableGraph:
    """A graph in a form that TensorRT compiles; its weights stay where they are.

    Attention in float32 is replaced by the operators of its definition in ONNX.

    Raises:
        UserError: The package onnx is not installed.
    """
    model = load_without_defaults(graph, "onnxruntime-gpu", "Compiling a graph with ONNX Runtime's TensorRT")
    import onnx
    from onnx.inliner import inline_selected_functions

    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    # Shapes are inferred anew: graphs of earlier versions declare one that onnx takes for a contradiction.
    del model.graph.value_info[:]
    if any(types.get(node.input[0]) == onnx.TensorProto.FLOAT for node in attention):
        model = inline_selected_functions(model, [("", "Attention")], inline_schema_functions=True)
    files = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return CompilableGraph(model.SerializeToString(), tuple(graph.parent / name for name in sorted(files)))
