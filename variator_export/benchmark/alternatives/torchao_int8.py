"""PyTorch in int8: torchao's dynamic quantisation of activations, with torch.compile."""

import torch

from variator_export.benchmark.alternatives.setup import Setup, attempt
from variator_export.engines.base import Runner
from variator_export.engines.eager import EagerModel

_NAME = "torchao"


def torchao(setup: Setup) -> Runner:
    """Quantise the linear layers of the backbone, with one scale per token, and compile it for each shape."""
    with attempt(_NAME, "torchao", "torchao cannot quantise the backbone", "torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = EagerModel(setup.backbone.to_dtype(torch.float32), None, attention="sdpa", compiled=True)
        quantize_(model.transformer, Int8DynamicActivationInt8WeightConfig())
    return model
