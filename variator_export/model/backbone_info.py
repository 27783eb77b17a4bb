"""Properties of a backbone that can be read without its weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Stack
from variator_export.core.axes import present_names
from variator_export.core.encoder_size import DecoderSize, EncoderSize
from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.labels import labels_config
from variator_export.core.parts import ENCODER, MODEL
from variator_export.core.precision import Precision
from variator_export.model.decoders.label_words import read_label_words
from variator_export.model.families import find_architecture, find_task
from variator_export.model.families.base import CLASSIFICATION, Architecture
from variator_export.model.plugin_layout import BackboneIdentity
from variator_export.model.pooling import PoolingSpec, read_pooling
from variator_export.model.quantization.calibration import Calibration
from variator_export.model.quantization.model import quantize_model
from variator_export.model.source import BackboneSource
from variator_export.text.tokenizer import TextEncoder


@dataclass(frozen=True)
class BackboneInfo:
    """Properties of a backbone that can be read without its weights.

    Attributes:
        source: Source of the backbone.
        spec: The backbone's architecture in the table of sites.
        config: The transformers configuration.
        pooling: The pooling that the folder declares for sentence embeddings; None if it declares none.
        layers: The number of layers of each stack in an assembly (`model.modular`). The numbers of the
            configuration hold for any other stack.
    """

    source: BackboneSource
    spec: Architecture
    config: Any
    pooling: PoolingSpec | None
    layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> BackboneIdentity:
        """The backbone's identity, as plugin files record it."""
        source = self.source
        return BackboneIdentity(
            model_type=self.spec.family.name, name=source.label, weights_sha256=source.weights_sha256
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of the backbone's graphs, in order."""
        own = (*self.spec.outputs, *self._cross_outputs)
        return (*own, *(("sentence_embedding",) if self.pooling else ()))

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Names of the outputs with one row per token."""
        return (*self.spec.token_outputs, *self._cross_outputs)

    @property
    def _cross_outputs(self) -> tuple[str, ...]:
        """Names of the keys and values for a decoder; none for a model that does not generate text."""
        size = self.decoder_size
        return () if size is None else present_names(size.num_layers, "encoder")

    @property
    def size(self) -> EncoderSize:
        """The sizes of the backbone's encoder."""
        size = self.spec.family.size(self.config)
        size = dataclasses.replace(size, num_layers=self.layers.get(ENCODER_STACK, size.num_layers))
        if not self.spec.head.has_decoder or (decoder := self._size_of_decoder()) is None:
            return size
        return dataclasses.replace(size, cross_size=decoder.cross_size)

    def _size_of_decoder(self) -> DecoderSize | None:
        decoder = self.spec.family.decoder
        if decoder is None:
            return None
        size = decoder.size(self.config)
        return dataclasses.replace(size, num_layers=self.layers.get(DECODER_STACK, size.num_layers))

    @property
    def part(self) -> str:
        """The part of the model that plugins are in."""
        return ENCODER if self.spec.head.generates else MODEL

    @property
    def decoder_size(self) -> DecoderSize | None:
        """The sizes of the backbone's decoder; None for a model that does not generate text."""
        return self._size_of_decoder() if self.spec.head.generates else None

    @property
    def stack_layers(self) -> dict[Stack, int]:
        """The number of layers of each stack."""
        found: dict[Stack, int] = {ENCODER_STACK: self.size.num_layers}
        if (decoder := self.decoder_size) is not None:
            found[DECODER_STACK] = decoder.num_layers
        return found

    @property
    def max_length(self) -> int | None:
        """The longest input in tokens; None if there is no limit."""
        return self.spec.family.max_length(self.config)

    @property
    def max_output_length(self) -> int | None:
        """The longest generated text in tokens; None if there is no limit or no decoder."""
        decoder = self.spec.family.decoder
        return decoder.max_length(self.config) if self.spec.head.generates and decoder is not None else None

    def quantize(
        self,
        model: nn.Module,
        precision: Precision,
        kept: Sequence[str] = (),
        calibration: Calibration | None = None,
        original: nn.Module | None = None,
    ) -> int:
        """Quantise a model of this architecture in place; returns the number of quantised linear layers.

        Args:
            model: The model, in float32 or in the precision's own type.
            precision: The precision.
            kept: Parts of the names of modules that are not quantised, besides the family's own.
            calibration: The calibration, for precisions that need one.
            original: The model in float32, if `model` is in another type.
        """
        family = self.spec.family
        kept = (*family.float32_modules, *kept)
        return quantize_model(model, family.stack, kept, precision, calibration, original)


def read_backbone_info(
    source: BackboneSource,
    architecture: str | None = None,
    task: str | None = None,
    label_words: Mapping[str, str] | None = None,
    decoder_prompt: str = "",
) -> BackboneInfo:
    """Read a backbone's configuration and find it in the table of sites.

    Args:
        source: Source of the backbone.
        architecture: The transformers class to load; None for the class that config.json names.
        task: Task of the class to load, which is chosen from the same family. An alternative to
            `architecture`.
        label_words: The word of each label, for a classifier made of a model that generates text.
        decoder_prompt: What its decoder reads before the label word.

    Raises:
        UserError: The configuration cannot be read or the architecture is not supported.
    """
    path = source.folder / "config.json"
    content = read_json_object(path, "Restore it from its source.")
    listed = content.get("architectures")
    named = architecture or (listed[0] if isinstance(listed, list) and listed else None)
    if not isinstance(named, str):
        raise UserError(
            f"{path} does not name its architecture.",
            "Set backbone.architecture in the recipe, for example BertModel.",
        )
    spec = find_architecture(named) if task is None else find_task(named, task)
    if content.get("model_type") != spec.family.name:
        raise UserError(
            f"{path} has model_type {content.get('model_type')!r}; {named} belongs to {spec.family.name!r}.",
            "Choose an architecture of the backbone's own family.",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
    except Exception as error:  # transformers' validation raises errors of any type
        raise UserError(
            f"{path} is refused by transformers {transformers.__version__}: {error}",
            "Restore it from its source, or save it again with this version of transformers.",
        ) from error
    reason = spec.family.refuse(config)
    if reason is not None:
        raise UserError(f"The backbone {source.name} cannot be compressed: {reason}.", "Choose another one.")
    if label_words is not None:
        spec = _with_label_words(source, spec, config, label_words, decoder_prompt)
        for name, value in labels_config(label_words).items():
            setattr(config, name, value)
        config.id2label = dict(enumerate(label_words))  # transformers has numbers where JSON cannot
    elif decoder_prompt:
        raise UserError(
            "A decoder prompt stands before a label word, and there are no label words.",
            "Give a label word for each label, or leave out the prompt.",
        )
    return BackboneInfo(source, spec, config, _pooling(source.folder, spec))


def _with_label_words(
    source: BackboneSource, spec: Architecture, config: Any, words: Mapping[str, str], prompt: str
) -> Architecture:
    if not spec.head.generates:
        raise UserError(
            f"Label words need a model that generates text; {spec.name} does not.",
            "Leave them out, or choose a checkpoint such as T5ForConditionalGeneration.",
        )
    start = getattr(config, "decoder_start_token_id", None)
    found = read_label_words(words, prompt, TextEncoder(source.folder), start)
    return dataclasses.replace(spec, head=dataclasses.replace(CLASSIFICATION, label_words=found))


def _pooling(folder: Path, spec: Architecture) -> PoolingSpec | None:
    embeds = "last_hidden_state" in spec.outputs and not spec.head.generates
    return read_pooling(folder) if embeds else None
