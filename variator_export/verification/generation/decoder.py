"""The decoder of a model that generates text, as it runs to be verified."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import Variant
from variator_export.core.axes import ENCODER_MASK, past_names, present_names
from variator_export.core.encoder_size import DecoderSize
from variator_export.engines.base import Arrays, Runner
from variator_export.generation.search import StepDecoder
from variator_export.verification.verified_graph import open_for_verification

LOGITS = "logits"
D_co = TypeVar("D_co", bound=StepDecoder, covariant=True)


@dataclass(frozen=True)
class DecoderRun(Generic[D_co]):
    """A decoder with a variant's encoder.

    Attributes:
        file: The file of the decoder's graph or engine.
        start: Runs the encoder on inputs, and starts a call of the decoder with so many rows for each.
        supports: Whether the encoder takes a batch size and a length, and the decoder so many rows for each
            row of the batch and so many new tokens. None for graphs, which take everything.
    """

    file: str
    start: Callable[[Arrays, int], D_co]
    supports: Callable[[int, int, int, int], bool] | None = None

    def most_new_tokens(self, shape: tuple[int, int], usual: int) -> int:
        """The tokens to check at a shape: of an engine, which may fail at one length only, all that it takes.

        Args:
            shape: Batch size and length.
            usual: The number for a graph.

        Returns:
            0 if the shape is not supported.
        """
        if (supports := self.supports) is None:
            return usual
        return _largest(lambda count: supports(*shape, 1, count))

    def most_copies(self, shape: tuple[int, int], new_tokens: int) -> int:
        """The most rows of the decoder for each row of the batch, with so many new tokens; 1 for a graph."""
        if (supports := self.supports) is None:
            return 1
        return _largest(lambda count: supports(*shape, count, new_tokens))


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number up to 4096 for which something holds, which holds for all smaller ones then."""
    low, high = 0, 4097
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


class RunnerDecoder:
    """A call of a decoder's graph, with a cache in numpy (`generation.search.StepDecoder`).

    Args:
        decoder: The runner of the decoder's graph.
        size: The decoder's sizes.
        mask: The encoder's attention mask, int64 (B, S).
        states: The outputs of the encoder's graph, by name.
    """

    def __init__(
        self, decoder: Runner, size: DecoderSize, mask: np.ndarray, states: Mapping[str, np.ndarray]
    ) -> None:
        self._decoder = decoder
        own, cross = (past_names(size.num_layers, stack) for stack in ("decoder", "encoder"))
        pairs = zip(cross, present_names(size.num_layers, "encoder"), strict=True)
        self._fixed = {ENCODER_MASK: mask} | {past: states[name] for past, name in pairs}
        dtype = states[present_names(1, "encoder")[0]].dtype
        empty = np.zeros((len(mask), size.num_heads, 0, size.head_size), dtype)
        self._past: Arrays = dict.fromkeys(own, empty)
        self._presents = present_names(size.num_layers, "decoder")

    def inputs(self, tokens: np.ndarray) -> Arrays:
        """The inputs of the decoder's graph for the next token of each row, int64 (rows,)."""
        return {**self._fixed, "input_ids": tokens[:, None], **self._past}

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Take the next token of each row, int64 (rows,); returns scores, float32 (rows, V)."""
        found = self._decoder.run(self.inputs(tokens))
        self._past = {past: found[name] for past, name in zip(self._past, self._presents, strict=True)}
        return found[LOGITS][:, -1]

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows."""
        self._past = {name: values[rows] for name, values in self._past.items()}


def run_of_graphs(
    file: str, encoder: Runner, decoder: Runner, size: DecoderSize
) -> DecoderRun[RunnerDecoder]:
    """A decoder's graph with an encoder's graph."""

    def start(inputs: Arrays, copies: int) -> RunnerDecoder:
        assert copies == 1
        return RunnerDecoder(decoder, size, inputs["attention_mask"], encoder.run(inputs))

    return DecoderRun(file, start)


def run_of_bundle(bundle: BundleFiles, variant: Variant) -> DecoderRun[RunnerDecoder]:
    """The decoder's graph of a bundle with a variant's encoder, each opened as it is verified."""
    manifest = bundle.manifest
    size, file = manifest.backbone.decoder_of(variant.assembly), variant.decoder_graph
    encoder, decoder = (
        open_for_verification(bundle.graph(graph), {}, manifest.precision) for graph in (variant.graph, file)
    )
    return run_of_graphs(file, encoder, decoder, size)
