"""What an engine is built from, as hashes: in a bundle's steps and in the engine's sidecar."""

from collections.abc import Callable, Sequence
from typing import Any

from variator_export.bundle.manifest import BACKBONE_WEIGHTS

# The keys of `engine_sources`.
SOURCES = ("graph", "weights", "plugin", "modules")
_MODULES = "modules/"


def engine_sources(graph: str, tensors: Sequence[str], sha256: Callable[[str], str]) -> dict[str, Any]:
    """Return the hashes of the files that an engine is built from.

    Args:
        graph: The graph.
        tensors: The files that the graph refers to besides the backbone's weights (`Method.tensor_files`).
        sha256: Returns the hash of a file of the bundle.
    """
    plugin = [name for name in tensors if not name.startswith(_MODULES)]
    modules = {name: sha256(name) for name in tensors if name.startswith(_MODULES)}
    return {
        "graph": sha256(graph),
        "weights": sha256(BACKBONE_WEIGHTS),
        "plugin": sha256(plugin[0]) if plugin else None,
        **({"modules": modules} if modules else {}),
    }
