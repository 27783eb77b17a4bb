"""The decoder of a model that generates text, on any runtime. Keys and values stay on the device."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from variator_export.bundle.manifest import BackboneEntry
from variator_export.core.assembly import Assembly
from variator_export.core.axes import (
    BATCH,
    ENCODER_MASK,
    LENGTH,
    PAST_LENGTH,
    InputShapes,
    past_name,
    past_names,
    present_names,
)
from variator_export.core.errors import UserError

_LOGITS = "logits"


class DeviceRunner(Protocol):
    """A graph or an engine whose values stay on a device from one run to the next."""

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Copy arrays to the device."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A value on the device that holds nothing: one of its sizes is 0."""
        ...

    def run_values(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, on arrays and on values on the device; the outputs stay there."""
        ...

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """Some rows of a value on the device, as another value there."""
        ...

    def reorder(self, value: Any, rows: np.ndarray) -> Any:
        """A value with as many rows, each a copy of one of them. The given value may be overwritten."""
        ...

    def download(self, value: Any) -> np.ndarray:
        """Copy a value from the device."""
        ...

    def covers(self, shapes: InputShapes) -> bool:
        """Whether inputs of these shapes can run. A graph takes all; an engine, those of its profiles."""
        ...

    @property
    def limits(self) -> str:
        """The shapes that can run, in words."""
        ...


class Decoder:
    """A decoder, which every call runs with a cache of its own.

    Args:
        runner: The decoder's graph or engine.
        backbone: The model that the decoder belongs to.
        assembly: The assembly whose decoder it is; None for the original layers.
    """

    def __init__(
        self, runner: DeviceRunner, backbone: BackboneEntry, assembly: Assembly | None = None
    ) -> None:
        self._runner, self._size = runner, backbone.decoder_of(assembly)
        self._inputs = {tensor.name: tensor for tensor in backbone.decoder_part(assembly).inputs}
        self._dtype = self._inputs[past_name(0, "decoder", "key")].dtype

    def require(self, rows: int, length: int, new_tokens: int) -> None:
        """Check that every step of a call can run, before the first.

        Args:
            rows: Rows of the decoder.
            length: Tokens of the encoder.
            new_tokens: The most tokens to generate.

        Raises:
            UserError: A step has shapes that the runner does not take.
        """
        if not self.supports(rows, length, new_tokens):
            raise UserError(
                f"The decoder's engine does not take {rows} rows, {length} input tokens and {new_tokens} "
                f"new tokens. It has {self._runner.limits}.",
                "Ask for fewer beams or new tokens; or compile with other engine.profiles "
                "(batch_size, sequence_length, new_tokens, num_beams).",
            )

    def supports(self, rows: int, length: int, new_tokens: int = 1) -> bool:
        """Whether every step of a call can run; arguments are those of `require`."""
        # The caches of all profiles start empty, so a profile that covers the last step covers those before.
        sizes = {BATCH: rows, LENGTH: length, PAST_LENGTH: new_tokens - 1}
        return self._runner.covers(
            {
                name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
                for name, tensor in self._inputs.items()
            }
        )

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
            fixed = {
                name: self._runner.take(value, np.arange(len(mask)) // copies)
                for name, value in fixed.items()
            }
        fixed |= self._runner.upload({ENCODER_MASK: mask})
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
        scores = self._runner.download(outputs[_LOGITS])[:, -1]
        return scores, {name: outputs[present] for name, present in pairs}

    def select(self, past: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        """As many rows of keys and values, which may be overwritten."""
        return {name: self._runner.reorder(value, rows) for name, value in past.items()}


class DecoderCall:
    """One call of a decoder: its keys and values so far (`generation.search.StepDecoder`)."""

    def __init__(self, decoder: Decoder, fixed: Mapping[str, Any], past: Mapping[str, Any]) -> None:
        self._decoder, self._fixed, self._past = decoder, fixed, past

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Take the next token of each row, int64 (rows,); returns scores, float32 (rows, V)."""
        scores, self._past = self._decoder.run(tokens, self._fixed, self._past)
        return np.asarray(scores)

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows. A row stays within its input's, so only the decoder's own states move."""
        if not np.array_equal(rows, np.arange(len(rows))):
            self._past = self._decoder.select(self._past, rows)
