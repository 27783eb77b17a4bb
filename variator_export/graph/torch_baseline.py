"""Plain `torch.onnx` export of the backbone: the graph that a user has without this package."""

from pathlib import Path

import torch
from torch import nn

from variator_export.core.errors import UserError, first_line
from variator_export.graph.export import quiet_exporter
from variator_export.model.augmented import PlainModel
from variator_export.model.backbone import Backbone


class _Positional(nn.Module):
    """`PlainModel` with positional inputs and outputs instead of named ones."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.names = backbone.spec.family.inputs
        self.model = PlainModel(backbone)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(dict(zip(self.names, inputs, strict=True))).values())


def export_plain(backbone: Backbone, path: Path) -> Path:
    """Export a backbone without plugins, with the tracing exporter that Optimum uses.

    ONNX Runtime's transformer optimizer recognizes the patterns of this exporter. In graphs of the
    torch.export-based exporter (PyTorch 2.13) it fuses no attention.

    Args:
        backbone: The backbone, in float32.
        path: The file to write.

    Raises:
        UserError: torch.onnx cannot export it.
    """
    module = _Positional(backbone).eval()
    names = list(module.names)
    example = torch.ones(2, 16, dtype=torch.int64)
    outputs = list(module.model(dict.fromkeys(names, example)))
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in names}
    axes |= {
        name: {0: "batch_size", 1: "sequence_length"}
        if name in backbone.info.token_outputs
        else {0: "batch_size"}
        for name in outputs
    }
    try:
        with quiet_exporter(), torch.no_grad():
            torch.onnx.export(
                module,
                (example,) * len(names),
                str(path),
                input_names=names,
                output_names=outputs,
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
    except Exception as error:  # the exporter raises errors of any type
        raise UserError(
            f"torch.onnx {torch.__version__} cannot export the backbone alone: {first_line(error)}",
            "Leave it out: choose the others with --runtime.",
        ) from error
    return path
