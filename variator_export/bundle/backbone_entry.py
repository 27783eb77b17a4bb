"""The backbone in `manifest.json`."""

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from variator_export.bundle.parts import PartEntry, with_plugins
from variator_export.bundle.variant import ManifestPart
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Assembly, Stack
from variator_export.core.axes import past_by_layer, present_names
from variator_export.core.encoder_size import DecoderSize, EncoderSize
from variator_export.core.labels import labels_config
from variator_export.core.parts import DECODER


class BackboneEntry(ManifestPart):
    """The properties of the backbone that a session needs.

    Attributes:
        task: The model's task, as named by Optimum. None in older bundles, which did not record the task.
        parts: The model's parts by name, with their inputs and outputs.
        max_length: The longest input in tokens. None if there is no limit.
        encoder_size: The dimensions needed for the analytic count of multiply-accumulates.
        padding_states_vary: Whether the hidden states of padding depend on the amount of padding.
        decoder_size: The dimensions of the decoder. None for a model that does not generate text.
        max_output_length: The longest generated text in tokens. None if there is no limit.
        label_words: The word of each label, in the order of the classes, of a classifier made of a model that
            generates text. None for any other model.
        decoder_prompt: What its decoder reads before the label word.
    """

    source: str
    architecture: str
    task: str | None = None
    model_type: str
    weights_sha256: str
    hidden_size: int
    num_layers: int
    parts: dict[str, PartEntry]
    pad_token_id: int
    max_length: int | None
    encoder_size: EncoderSize
    padding_states_vary: bool = False
    decoder_size: DecoderSize | None = None
    max_output_length: int | None = None
    label_words: dict[str, str] | None = None
    decoder_prompt: str = ""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "BackboneEntry":
        found = self.encoder_size.hidden_size, self.encoder_size.num_layers
        if found != (self.hidden_size, self.num_layers):
            raise ValueError("encoder_size has another hidden_size or num_layers than the backbone")
        return self

    def with_labels(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of the model's config.json, with the labels of label words."""
        return {**config, **({} if self.label_words is None else labels_config(self.label_words))}

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return DECODER in self.parts

    @property
    def part(self) -> PartEntry:
        """The part that plugins are in: the model, or the encoder of a model that generates text."""
        return with_plugins(self.parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input names of the part that plugins are in."""
        return self.part.input_names

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output names of the part that plugins are in, in order."""
        return self.part.output_names

    @property
    def stack_layers(self) -> dict[Stack, int]:
        """The number of original layers of each stack."""
        found: dict[Stack, int] = {ENCODER_STACK: self.num_layers}
        if self.decoder_size is not None:
            found[DECODER_STACK] = self.decoder_size.num_layers
        return found

    def decoder_of(self, assembly: Assembly | None) -> DecoderSize:
        """The sizes of an assembly's decoder, of a model that generates text."""
        assert self.decoder_size is not None
        return self.decoder_size.of_assembly(assembly)

    def decoder_part(self, assembly: Assembly | None) -> PartEntry:
        """The part of an assembly's decoder: that of the original, with fewer keys and values."""
        every, kept = (
            {*past_by_layer(count), *present_names(count, DECODER_STACK)}
            for count in (self.stack_layers[DECODER_STACK], self.decoder_of(assembly).num_layers)
        )
        return self.parts[DECODER].without(every - kept)

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """The outputs with one row per token."""
        return self.part.token_outputs

    def clamp_length(self, length: int) -> int:
        """A length in tokens, capped at the model's limit if the model has one."""
        return length if self.max_length is None else min(length, self.max_length)
