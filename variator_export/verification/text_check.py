"""End-to-end check from text to result, against the libraries with which the backbone's users run it.

The other checks compare a graph with eager PyTorch on equal token ids. They cannot see another truncation,
another prompt or another order of labels. This one starts from text, and compares with sentence-transformers
or with a pipeline of transformers on the backbone's own files.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.precision import find_precision
from variator_export.inference import EMBEDDING, TextModel
from variator_export.verification.cases import DEFAULT_TEXTS, UNUSUAL_TEXTS

# Distributions whose versions decide what the users' libraries compute.
DISTRIBUTIONS = ("sentence-transformers", "transformers", "tokenizers", "torch")
# Function that quantises a transformers model in place.
Quantize = Callable[[Any], object]


def check_texts(
    model: TextModel,
    source: Path,
    texts: Sequence[str] = (),
    precision: str = "float32",
    *,
    quantize: Quantize | None = None,
) -> None:
    """Compare a model's results for texts with those of the library that its users run.

    The texts are those given or the package's own, unusual ones, and one that is longer than the limit.

    Args:
        model: The uncompressed model of a bundle.
        source: The backbone's folder.
        texts: Real texts. If empty, the default texts of the package.
        precision: The precision of the graph. The library runs in float32.
        quantize: Quantises the library's model as the graph is quantised. None if it is not.

    Raises:
        NumbersDisagreeError: A result differs by more than rounding. The message names the text.
        UserError: The library cannot load the folder.
    """
    limit = model.encoder.max_length
    # One repetition has more than 50 tokens.
    longest = " ".join(DEFAULT_TEXTS * ((limit or 512) // 50 + 1))
    chosen = [*(texts or DEFAULT_TEXTS), *UNUSUAL_TEXTS, *([longest] if limit is not None else [])]
    allowed = find_precision(precision).agreement
    library = _library(model, source, quantize)
    for prompt in library.prompts:
        where = f" with the prompt {prompt!r}" if prompt is not None else ""
        for text, (found, expected) in zip(chosen, library.pairs(chosen, prompt), strict=True):
            _compare(found, expected, allowed, f"{_start(text)}{where}", library.name)


def _compare(found: np.ndarray, expected: np.ndarray, allowed: float, what: str, library: str) -> None:
    if found.shape != expected.shape:
        detail = f"it has the shape {found.shape}, not {expected.shape}"
    else:
        error = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))
        if error <= allowed:  # false for NaN
            return
        detail = f"its relative error is {error:.1e}, and {allowed:.0e} is allowed"
    raise NumbersDisagreeError(
        f"The bundle's result for the text {what} is not the one of {library}: {detail}.",
        "The tokenizer, truncation, prompts, pooling or labels differ: please report it with the backbone's "
        "name.",
    )


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


class _Library(ABC):
    """How the users of a backbone run it.

    Attributes:
        name: The library and its version.
        prompts: The prompts to check, by name.
    """

    name: str
    prompts: tuple[str | None, ...] = (None,)

    @abstractmethod
    def pairs(self, texts: Sequence[str], prompt: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the bundle's result and the library's for each text."""


def _library(model: TextModel, source: Path, quantize: Quantize | None) -> _Library:
    if EMBEDDING in model.backbone.outputs:
        return _SentenceTransformers(model, source, quantize)
    if model.backbone.label_words is not None:
        return _LabelWords(model, source, quantize)
    if model.backbone.task == "text-classification":
        return _Classifier(model, source, quantize)
    return _Tokens(model, source)


class _SentenceTransformers(_Library):
    """Embeddings of sentence-transformers."""

    def __init__(self, model: TextModel, source: Path, quantize: Quantize | None) -> None:
        import sentence_transformers

        from variator_export.model.backbone import quiet_transformers

        self.name = f"sentence-transformers {sentence_transformers.__version__}"
        self.prompts = (None, *model.encoder.settings.prompts)
        self._model = model
        try:
            with quiet_transformers():
                self._theirs = sentence_transformers.SentenceTransformer(
                    str(source), device="cpu", local_files_only=True
                )
        except Exception as error:  # a broken folder can fail anywhere in it
            raise _refused(self.name, source, error) from error
        if quantize is not None:
            quantize(self._theirs.transformers_model)

    def pairs(self, texts: Sequence[str], prompt: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        theirs = self._theirs.encode(list(texts), prompt_name=prompt, show_progress_bar=False)
        yield from zip(self._model.embed(texts, prompt_name=prompt), theirs, strict=True)


class _Classifier(_Library):
    """Scores by label of transformers' text-classification pipeline."""

    def __init__(self, model: TextModel, source: Path, quantize: Quantize | None) -> None:
        import transformers

        from variator_export.model.backbone import quiet_transformers

        self.name = f"transformers {transformers.__version__}"
        self._model = model
        try:
            with quiet_transformers():
                self._theirs = transformers.pipeline(
                    "text-classification", str(source), device="cpu", top_k=None
                )
        except Exception as error:
            raise _refused(self.name, source, error) from error
        if quantize is not None:
            quantize(self._theirs.model)

    def pairs(self, texts: Sequence[str], prompt: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        limit = self._model.encoder.max_length
        ours = self._model.predict(texts, prompt_name=prompt)
        for text, found in zip(texts, ours, strict=True):
            (expected,) = self._theirs([text], truncation=limit is not None, max_length=limit)
            yield (
                np.array([found["scores"].get(row["label"], np.nan) for row in expected]),
                np.array([row["score"] for row in expected]),
            )


class _LabelWords(_Library):
    """Scores of label words, from transformers' model and tokenizer."""

    def __init__(self, model: TextModel, source: Path, quantize: Quantize | None) -> None:
        import transformers

        from variator_export.model.backbone import quiet_transformers

        self.name = f"transformers {transformers.__version__}"
        self._model = model
        try:
            with quiet_transformers():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
                self._theirs: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                    source, local_files_only=True, use_safetensors=True, dtype="float32"
                ).eval()
        except Exception as error:
            raise _refused(self.name, source, error) from error
        if quantize is not None:
            quantize(self._theirs)

    def pairs(self, texts: Sequence[str], prompt: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import torch

        words, backbone = self._model.backbone.label_words or {}, self._model.backbone
        start = [self._theirs.config.decoder_start_token_id]
        start += self._tokenizer(backbone.decoder_prompt, add_special_tokens=False)["input_ids"]
        ids = [self._tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words.values()]
        limit = self._model.encoder.max_length
        ours = self._model.predict(texts, prompt_name=prompt)
        for text, found in zip(texts, ours, strict=True):
            inputs = self._tokenizer(
                text, truncation=limit is not None, max_length=limit, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self._theirs(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=torch.tensor([start]),
                ).logits
            expected = logits[0, -1, ids].softmax(-1)
            yield np.array([found["scores"][label] for label in words]), expected.numpy()


class _Tokens(_Library):
    """Token ids of transformers' tokenizer. What follows them has been compared with eager PyTorch."""

    def __init__(self, model: TextModel, source: Path) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._model = model
        try:
            self._theirs = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        except Exception as error:
            raise _refused(self.name, source, error) from error

    def pairs(self, texts: Sequence[str], prompt: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        limit = self._model.encoder.max_length
        for encoding, text in zip(self._model.encode(texts, prompt_name=prompt), texts, strict=True):
            theirs: Any = self._theirs(text, truncation=limit is not None, max_length=limit)
            yield np.array(encoding.ids, np.float64), np.array(theirs["input_ids"], np.float64)


def _refused(library: str, source: Path, error: Exception) -> UserError:
    return UserError(
        f"{library} cannot load {source}: {error}",
        "Its users could not run it either: copy the folder again from its source.",
    )
