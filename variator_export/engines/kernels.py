"""Kernels of an engine, by layer of the model: how often a GPU is started for one call.

Where calls are short, starting kernels takes most of the time. So the number of kernels in each layer says
more about a graph's form than its multiply-accumulates do.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The name of a node starts with its module: `encoder.layer.0.attention.self/Attention_1`. The first number in
# it is that of the layer.
_LAYER = re.compile(r"^([^/]*?\.\d+)(?=[./])")
_PLUGIN = ".plugin."


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        kind: `product` for matrix products, with what is fused into them; `other` for everything else.
        name: The builder's name.
        nodes: The ONNX nodes that the kernel computes; empty for kernels that the builder adds, for example
            to change a layout.
        layer: The first layer that the kernel works for: `encoder.layer.0`; None outside of layers.
    """

    kind: str
    name: str
    nodes: tuple[str, ...]
    layer: str | None

    @property
    def modules(self) -> tuple[str, ...]:
        """The PyTorch modules that the nodes came from, in order."""
        return tuple(dict.fromkeys(node.partition("/")[0] for node in self.nodes))

    @property
    def is_of_plugin(self) -> bool:
        """Whether the kernel does work of the compression plugin, perhaps among other work."""
        return any(_PLUGIN in node.partition("/")[0] + "." for node in self.nodes)


def layers_of(calls: Sequence[Sequence[str]]) -> list[str | None]:
    """The layer of each kernel, by the nodes of all kernels in the order of their calls.

    A kernel without nodes belongs to the layer that the kernels before and after it have in common.
    """
    found = [next((m[1] for node in nodes if (m := _LAYER.match(node))), None) for nodes in calls]
    for index, nodes in enumerate(calls):
        if not nodes and 0 < index < len(calls) - 1:
            following = next(
                (layer for layer, own in zip(found[index:], calls[index:], strict=True) if own), None
            )
            found[index] = found[index - 1] if found[index - 1] == following else None
    return found


@dataclass(frozen=True)
class Schedule:
    """The kernels of an engine in the order of their calls.

    Attributes:
        kernels: The kernels.
        attention_accumulates: Type in which fused attention adds products, `float32` or `float16`; None if no
            attention is fused, or its kernels do not tell.
    """

    kernels: tuple[Kernel, ...]
    attention_accumulates: str | None

    @property
    def by_layer(self) -> dict[str, int]:
        """The number of kernels in each layer, in order."""
        return dict(Counter(kernel.layer for kernel in self.kernels if kernel.layer is not None))

    def summary(self) -> dict[str, Any]:
        """Counts for an engine's sidecar."""
        counts = self.by_layer
        return {
            "per_layer": _usual(list(counts.values())),
            "in_layers": sum(counts.values()),
            "elsewhere": len(self.kernels) - sum(counts.values()),
            "attention_accumulates": self.attention_accumulates,
        }


def _usual(counts: Sequence[int]) -> int | None:
    """The most frequent number: first and last layers may have more, for what comes before and after them."""
    return Counter(counts).most_common(1)[0][0] if counts else None
