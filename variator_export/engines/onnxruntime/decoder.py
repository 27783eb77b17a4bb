"""The decoder of a model that generates text, on ONNX Runtime. Keys and values stay on the device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.axes import past_names, present_names
from variator_export.core.encoder_size import DecoderSize
from variator_export.engines.onnxruntime.graph import IoBindingRunner
from variator_export.engines.onnxruntime.providers import Provider


class OnnxRuntimeDecoder:
    """A decoder's graph, which every call runs with a cache of its own.

    Args:
        graph: The ONNX file.
        size: The decoder's sizes.
        dtype: The type of keys and values, as named by numpy.
        provider: The provider that runs the graph.
        threads: Threads of one operator, as for `IoBindingRunner`.
    """

    def __init__(
        self, graph: Path, size: DecoderSize, dtype: str, provider: Provider, *, threads: int | None = None
    ) -> None:
        self._runner = IoBindingRunner(graph, provider, threads=threads, bind=True)
        self._size, self._dtype = size, dtype

    def start(self, mask: np.ndarray, cross: Mapping[str, Any], copies: int = 1) -> "DecoderCall":
        """Start a call.

        Args:
            mask: The encoder's attention mask, int64 (B, S).
            cross: The encoder's keys and values by their names as outputs, on the device.
            copies: The number of rows for each input.
        """
        layers, size = self._size.num_layers, self._size
        pairs = zip(past_names(layers, "encoder"), present_names(layers, "encoder"), strict=True)
        fixed = {past: cross[present] for past, present in pairs}
        if copies > 1:
            mask = np.repeat(mask, copies, axis=0)
            fixed = {name: self._rows(value, np.arange(len(mask)) // copies) for name, value in fixed.items()}
        fixed |= self._runner.upload({"encoder_attention_mask": mask})
        empty = self._runner.empty((len(mask), size.num_heads, 0, size.head_size), self._dtype)
        past = dict.fromkeys(past_names(layers, "decoder"), empty)
        return DecoderCall(self, fixed, past)

    def run(
        self, tokens: np.ndarray, fixed: Mapping[str, Any], past: Mapping[str, Any]
    ) -> "tuple[Any, dict[str, Any]]":
        """Take one token of each row, int64 (rows,).

        Returns:
            Scores, float32 (rows, V), and the keys and values so far.
        """
        outputs = self._runner.run_values({"input_ids": tokens[:, None]}, {**fixed, **past})
        layers = self._size.num_layers
        pairs = zip(past_names(layers, "decoder"), present_names(layers, "decoder"), strict=True)
        return outputs["logits"].numpy()[:, -1], {name: outputs[present] for name, present in pairs}

    def _rows(self, value: Any, rows: np.ndarray) -> Any:
        return self._runner.take(value, rows)

    def select(self, past: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        """Some rows of keys and values."""
        return {name: self._rows(value, rows) for name, value in past.items()}


class DecoderCall:
    """One call of a decoder: its keys and values so far (`generation.search.StepDecoder`)."""

    def __init__(
        self, decoder: OnnxRuntimeDecoder, fixed: Mapping[str, Any], past: Mapping[str, Any]
    ) -> None:
        self._decoder, self._fixed, self._past = decoder, fixed, past

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Take the next token of each row, int64 (rows,); returns scores, float32 (rows, V)."""
        scores, self._past = self._decoder.run(tokens, self._fixed, self._past)
        return np.asarray(scores)

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows. A row stays within its input's, so only the decoder's own states move."""
        if not np.array_equal(rows, np.arange(len(rows))):
            self._past = self._decoder.select(self._past, rows)
