"""What all traces share: the exporter, and weights that keep their names."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from variator_export.graph.weights import detach
from variator_export.model.backbone import Backbone

# A constant of the trace, such as a table of positions, may be stored in the graph. A weight may not.
_MAX_INLINE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Traced:
    """A trace before its weights are attached.

    Attributes:
        model: The graph.
        weights: Names of the weights that the graph uses, in the backbone's state dict.
        defaults: Default values of inputs.
    """

    model: ir.Model
    weights: set[str]
    defaults: Mapping[str, np.ndarray] = field(default_factory=dict)


def export(
    module: nn.Module,
    inputs: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Any],
    names: tuple[Sequence[str], Sequence[str]],
    opset: int,
) -> ir.Model:
    """Export a module without optimization, so that its weights keep their names and layout.

    Args:
        module: The module.
        inputs: Its inputs by name; a dict of tensors is one input.
        dynamic_shapes: The symbolic dimensions, in the structure of the inputs.
        names: The names of the graph's inputs and outputs.
        opset: ONNX opset of the graph.
    """
    with quiet_exporter(), _AlwaysClamp():
        program = torch.onnx.export(
            module,
            # Pass keywords, because a dict at the end of `args` would be interpreted as keywords anyway.
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dict(dynamic_shapes),
            input_names=list(names[0]),
            output_names=list(names[1]),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


class _AlwaysClamp(TorchFunctionMode):
    """Let a model clamp its hidden states without first asking whether they are finite (BART in float16).

    A trace cannot branch on values. Clamping to just below the largest float16 leaves finite values as they
    are, and turns infinite ones into finite ones, as the branch does.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        del types
        if function in (torch.isfinite, Tensor.isfinite):
            return _NotAllFinite()
        return function(*arguments, **(options or {}))


class _NotAllFinite:
    """What `isfinite` returns: not all values are."""

    def all(self) -> bool:
        """Return False."""
        return False


def detach_parameters(graph: ir.Graph, traced: nn.Module, backbone: Backbone) -> set[str]:
    """Rename every weight to its name in the backbone's state dict and detach it; returns the names."""
    # Tied weights have several names. Use the first one, regardless of the exporter's choice.
    parameters = list(backbone.model.named_parameters(remove_duplicate=False))
    named = {id(parameter): name for name, parameter in reversed(parameters)}
    named |= {id(buffer): name for name, buffer in backbone.model.named_buffers() if name in backbone.state}
    own: dict[str, Tensor] = {
        **dict(traced.named_parameters(remove_duplicate=False)),
        **dict(traced.named_buffers(remove_duplicate=False)),
    }
    found: dict[str, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = own.get(str(value.name))
        if tensor is None or (name := named.get(id(tensor))) is None:
            continue
        del graph.initializers[str(value.name)]
        if name in found:
            value.replace_all_uses_with(found[name])
            continue
        value.name = name
        graph.initializers[name] = value
        detach(graph, value)
        found[name] = value
    return set(found)


def check_inline(graph: ir.Graph) -> None:
    """Check that no weight is left in the graph under another name, because each is stored only once."""
    for name, value in graph.initializers.items():
        size = value.const_value.nbytes if value.const_value is not None else 0
        assert size <= _MAX_INLINE_BYTES, f"{name} ({size} bytes) is not a weight of the backbone"


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress the output and warnings of torch.onnx, most of which concern its own future."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # noqa: PTH123
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
