"""Pooling outside a graph, as users of another export do it."""

from collections.abc import Mapping

import numpy as np
import torch

from variator_export.engines.base import Arrays, Runner
from variator_export.model.backbone import Backbone
from variator_export.model.pooling import Pooling


class _Pooled:
    """A runner whose token vectors are pooled in PyTorch."""

    def __init__(self, runner: Runner, pooling: Pooling) -> None:
        self._runner, self._pooling = runner, pooling

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once; int64 inputs (B, S)."""
        outputs = self._runner.run(inputs)
        with torch.inference_mode():
            pooled = self._pooling(
                torch.from_numpy(outputs["last_hidden_state"]), torch.from_numpy(inputs["attention_mask"])
            )
        return {**outputs, "sentence_embedding": pooled.numpy()}


def with_pooling(runner: Runner, backbone: Backbone) -> Runner:
    """Add `sentence_embedding` to a runner's outputs if the backbone declares a pooling."""
    return _Pooled(runner, Pooling(backbone.pooling)) if backbone.pooling else runner
