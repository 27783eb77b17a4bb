"""CTranslate2, in float32 and in int8: encoders like BERT without heads, and models that generate text."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from variator_export.benchmark.alternatives.pooled import with_pooling
from variator_export.benchmark.alternatives.setup import Setup, attempt
from variator_export.core.environment import default_threads
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.generation.settings import GenerationSettings
from variator_export.text.tokenizer import TextEncoder

_MODULE = "ctranslate2"


class _Encoder:
    """An encoder in CTranslate2. Padding has to be on the right."""

    def __init__(self, encoder: object) -> None:
        self._encoder = encoder

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model once; int64 inputs (B, S)."""
        import ctranslate2

        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        kinds = inputs.get("token_type_ids")
        found = self._encoder.forward_batch(  # type: ignore[attr-defined]
            ctranslate2.StorageView.from_array(np.ascontiguousarray(ids, np.int32)),
            ctranslate2.StorageView.from_array(mask.sum(1).astype(np.int32)),
            token_type_ids=None if kinds is None else kinds.tolist(),
        )
        return {"last_hidden_state": np.array(found.last_hidden_state)}


def in_float32(setup: Setup) -> Runner:
    """The backbone in CTranslate2, in float32."""
    return _open(setup, "float32")


def in_int8(setup: Setup) -> Runner:
    """The backbone in CTranslate2, with linear layers in int8."""
    return _open(setup, "int8")


def _open(setup: Setup, compute_type: str) -> Runner:
    backbone = setup.backbone
    if tuple(backbone.spec.outputs) != ("last_hidden_state",):
        raise UserError(
            f"CTranslate2 has no {backbone.spec.name}: it converts encoders without a head.",
            "Leave it out: choose the others with --runtime.",
        )
    return with_pooling(_Encoder(_load(setup, "Encoder", compute_type)), backbone)


def translator(
    setup: Setup, compute_type: str, encoder: TextEncoder, settings: GenerationSettings
) -> Callable[[Arrays, int, int], object]:
    """The backbone in CTranslate2, as a function from inputs, new tokens and beams to generated tokens.

    Args:
        setup: What the alternative is made from.
        compute_type: `float32` or `int8`.
        encoder: The model's tokenizer, because CTranslate2 reads tokens as the vocabulary spells them.
        settings: The model's own settings.
    """
    loaded = _load(setup, "Translator", compute_type)

    def generate(inputs: Arrays, tokens: int, beams: int) -> object:
        rows = [
            [encoder.token(int(token)) for token, kept in zip(ids, mask, strict=True) if kept]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return loaded.translate_batch(
            rows,
            beam_size=beams,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
            max_input_length=0,
            length_penalty=settings.length_penalty,
        )

    return generate


def _load(setup: Setup, kind: str, compute_type: str) -> Any:
    folder = setup.scratch / "ctranslate2"
    with attempt(_MODULE, _MODULE, "CTranslate2 cannot convert or open the backbone"):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        if not folder.exists():
            TransformersConverter(str(setup.backbone.info.source.folder)).convert(str(folder))
        threads = setup.threads or default_threads() or 0
        return getattr(ctranslate2, kind)(str(folder), compute_type=compute_type, intra_threads=threads)
