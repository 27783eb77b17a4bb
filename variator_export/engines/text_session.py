"""Sessions that generate text: an encoder at any ratio, and a decoder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BACKBONE_CONFIG
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.decoder import Decoder, DecoderCall
from variator_export.engines.target import Session
from variator_export.generation.search import Sequences, generate, rows_per_input, stream
from variator_export.generation.settings import SETTINGS_NAME, GenerationSettings, read_settings


class EncoderSession(Session, Protocol):
    """A session on an encoder whose outputs a decoder reads."""

    def find(self, choice: int | str | None) -> str:
        """The name of the variant or the added plugin that a choice of `run` means."""
        ...

    def run_on_device(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None
    ) -> dict[str, Any]:
        """Run once, as `run` does, and leave the outputs on the device."""
        ...


class TextSession:
    """A session that generates text.

    The variant is chosen for each call. All ratios have the same decoder; an assembly may have its own.
    Threads may share a session.

    Args:
        bundle: The bundle.
        encoder: A session on the bundle's encoder.
        decoders: The decoders of the variants that the encoder runs, by name (`Variant.decoder_name`), on the
            device of the encoder.
    """

    def __init__(self, bundle: BundleFiles, encoder: EncoderSession, decoders: Mapping[str, Decoder]) -> None:
        self._encoder, self._decoders = encoder, decoders
        self._names = {variant.name: variant.decoder_name for variant in bundle.manifest.variants}
        self._limit = bundle.manifest.backbone.max_output_length
        for name in (SETTINGS_NAME, BACKBONE_CONFIG):
            if name in bundle.manifest.files:
                bundle.file(name)
        self.settings = read_settings(bundle.path)
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that the session runs, ascending."""
        return self._encoder.ratios

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the session runs: the bundle's variants, then the added plugins."""
        return self._encoder.names

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Add another plugin of the backbone (`Session.add_plugin`)."""
        self._encoder.add_plugin(name, source)

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the encoder once; returns its states, and the keys and values for the decoder."""
        return self._encoder.run(inputs, ratio, outputs)

    def generate(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None, **settings: Any
    ) -> Sequences:
        """Generate tokens.

        Args:
            inputs: int64 arrays (B, S): `input_ids`, and `attention_mask` with 0 for padding.
            ratio: A ratio, or the name of a variant or of an added plugin. None for the default variant.
            **settings: Changes of the model's own settings (`GenerationSettings`).

        Returns:
            The sequences of each input, with their end token and without the start token.

        Raises:
            UserError: The session has no such variant, the inputs do not fit, or a setting does not exist,
                contradicts another one, or asks for more tokens than the model has positions.
        """
        asked = self._settings(settings)
        return generate(self._start(inputs, ratio, asked), _tokens(inputs), asked)

    def stream(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None, **settings: Any
    ) -> Iterator[np.ndarray]:
        """Generate tokens one after the other; arguments and errors are those of `generate`.

        Yields:
            The next token of each row, int64 (rows,), and the pad token for rows that ended.
        """
        asked = self._settings(settings)
        return stream(self._start(inputs, ratio, asked), _tokens(inputs), asked)

    def start(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None, copies: int = 1
    ) -> DecoderCall:
        """Run the encoder, and start a call of the decoder; arguments and errors are those of `generate`.

        Args:
            inputs: As for `generate`.
            ratio: As for `generate`.
            copies: Rows of the decoder for each row of the inputs.
        """
        states = self._encoder.run_on_device(inputs, ratio)
        mask = np.ascontiguousarray(inputs["attention_mask"], np.int64)
        return self._decoder(ratio).start(mask, states, copies)

    def supports(self, rows: int, length: int, new_tokens: int = 1, ratio: int | str | None = None) -> bool:
        """Whether a variant's decoder takes so many rows and new tokens, of inputs of this length."""
        return self._decoder(ratio).supports(rows, length, new_tokens)

    def _decoder(self, ratio: int | str | None) -> Decoder:
        # An added plugin is for the original layers.
        return self._decoders[self._names.get(self._encoder.find(ratio), ANY_RATIO)]

    def _settings(self, changes: Mapping[str, Any]) -> GenerationSettings:
        settings = self.settings.changed(changes)
        if self._limit is not None and settings.max_new_tokens > self._limit:
            raise UserError(
                f"max_new_tokens is {settings.max_new_tokens}; the model has positions for {self._limit}.",
                f"Set max_new_tokens to {self._limit} at most.",
            )
        return settings

    def _start(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None, settings: GenerationSettings
    ) -> DecoderCall:
        mask = np.asarray(inputs.get("attention_mask", np.ones(1)))
        if mask.ndim == 2 and not mask.any(axis=1).all():
            row = int(np.flatnonzero(~mask.any(axis=1))[0])
            raise UserError(
                f"Row {row + 1} of the inputs has no token: its attention mask is 0 everywhere.",
                "Leave out the row, or give it a token.",
            )
        copies = rows_per_input(settings)
        if mask.ndim == 2:
            self._decoder(ratio).require(len(mask) * copies, mask.shape[1], settings.max_new_tokens)
        return self.start(inputs, ratio, copies)


def _tokens(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The tokens of each row, without padding."""
    ids, mask = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])
    return [row[kept > 0] for row, kept in zip(ids, mask, strict=True)]
