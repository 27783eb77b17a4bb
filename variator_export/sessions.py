"""The public API for a finished bundle. Needs neither torch nor transformers."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.hub_bundle import bundle_folder
from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.engines.batches import BATCH_SIZE
from variator_export.engines.target import Session, SessionOptions, Specialization
from variator_export.engines.targets import TARGETS
from variator_export.inference import TextModel, TextOrPair
from variator_export.text.tokenizer import TextEncoder
from variator_export.text_to_text import TextToText, one_text, text_to_text


class Bundle(BundleFiles):
    """A bundle on disk, with its sessions and its tokenizer.

    Attributes:
        path: The bundle's folder.
        manifest: The content of `manifest.json`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._sessions: dict[str, Session] = {}
        self._encoder: TextEncoder | None = None
        self._config: dict[str, Any] | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Open a bundle.

        Args:
            path: The bundle's folder; or `ORGANISATION/NAME[@REVISION]` on the Hugging Face Hub, which is
                copied once for each commit.

        Raises:
            UserError: A file is missing, is a link, or differs in size from the manifest. Hashes are
                checked when a file is used; `check_all` checks all of them. Or the hub does not have the
                repository, or cannot be reached.
        """
        return cls(bundle_folder(path))

    def session(
        self,
        target: str = "onnxruntime",
        variant: int | str | None = None,
        *,
        threads: int | None = None,
        allow_unverified: bool = False,
        lean_runtime: Path | None = None,
        cuda_graphs: bool = False,
        specialization: Specialization = "lazy",
    ) -> Session:
        """Open a session.

        Args:
            target: The runtime: `onnxruntime` on the CPU, one of its providers for NVIDIA GPUs, or
                `tensorrt-rtx` or `tensorrt` with an engine of the bundle. The requested target runs or
                fails; there is no fallback to another one.
            variant: A ratio or a variant name, for a session that runs that variant. None for one session
                that runs every ratio, chosen per call: `session.run(inputs, ratio=4)`.
            threads: Threads per operator, `onnxruntime` only. None for `OMP_NUM_THREADS`, or all cores.
            allow_unverified: Run an engine that was built but never verified on a device.
            lean_runtime: Library of the lean runtime of the TensorRT that built an engine, for an
                earlier version than the installed one (`engine.version_compatible`).
            cuda_graphs: Capture an engine's work once per shape and variant, and replay it.
                `tensorrt-rtx` and `tensorrt` only.
            specialization: When kernels for the shapes of a call are compiled: `lazy`, in the background,
                while kernels for all shapes run; `eager`, before the first call of these shapes, as with
                `cuda_graphs`; or `none`. `tensorrt-rtx` only.

        Raises:
            UserError: The target cannot run on this machine, or the variant or engine does not exist.
        """
        if specialization not in get_args(Specialization):
            raise UserError(
                f"There is no specialization {specialization!r}.",
                f"Choose one of {', '.join(get_args(Specialization))}.",
            )
        options = SessionOptions(threads, allow_unverified, lean_runtime, cuda_graphs, specialization)
        name = None if variant is None else self.variant(variant).name
        return TARGETS.find(target).open(self, name, options)

    def embed(
        self,
        texts: str | Iterable[str],
        ratio: int | str | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        prompt_name: str | None = None,
        prompt: str | None = None,
        target: str = "onnxruntime",
    ) -> np.ndarray:
        """Sentence embeddings of texts. At ratio 1 they are those of sentence-transformers.

        Texts are truncated where the model's users truncate them. They run in batches of similar length, in
        one session that the bundle keeps open. Threads may share a bundle.

        Args:
            texts: Texts, from a list, an array, a series or a generator; or one text.
            ratio: The ratio, or the name of a variant. None for the default variant.
            batch_size: The largest number of texts to run at once.
            prompt_name: The prompt to put before each text; None for the model's default prompt.
            prompt: The text of a prompt, instead of its name; empty for no prompt.
            target: The runtime, as for `session`.

        Returns:
            float32 (number of texts, hidden size), or (hidden size,) for one text.

        Raises:
            UserError: The model has no sentence embeddings, there is no such variant or prompt, or a text is
                not a string; the message names its row.
        """
        model = self.text_model(ratio, target)
        found = model.embed(
            [texts] if isinstance(texts, str) else texts,
            batch_size=batch_size,
            prompt_name=prompt_name,
            prompt=prompt,
        )
        return found[0] if isinstance(texts, str) else found

    def predict(
        self,
        texts: str | Iterable[TextOrPair],
        ratio: int | str | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        prompt_name: str | None = None,
        prompt: str | None = None,
        target: str = "onnxruntime",
    ) -> Any:
        """Predictions for texts or pairs of texts, by the model's task.

        - `text-classification`: a dict with `label`, `score`, and `scores` by label;
        - `token-classification`: a list of entities with `entity_group`, `score`, `word`, `start` and `end`;
        - `question-answering`, of (question, context): `answer`, `score`, `start` and `end` in the context;
        - `fill-mask`: for each mask, a list of `token`, `token_str` and `score`, best first.

        Args:
            texts: Texts or pairs, from a list, an array, a series or a generator; or one text.
            ratio: The ratio, or the name of a variant. None for the default variant.
            batch_size: The largest number of rows to run at once.
            prompt_name: The prompt to put before each text; None for the model's default prompt.
            prompt: The text of a prompt, instead of its name; empty for no prompt.
            target: The runtime, as for `session`.

        Returns:
            A prediction for each row, in a list, or one prediction for one text.

        Raises:
            UserError: The task has no predictions, there is no such variant or prompt, or a text is not a
                string; the message names its row.
        """
        model = self.text_model(ratio, target)
        found = model.predict(
            [texts] if isinstance(texts, str) else texts,
            batch_size=batch_size,
            prompt_name=prompt_name,
            prompt=prompt,
        )
        return found[0] if isinstance(texts, str) else found

    def generate(
        self,
        texts: str | Iterable[str],
        ratio: int | str | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        target: str = "onnxruntime",
        **settings: Any,
    ) -> Any:
        """Texts that a model of the task `text2text-generation` makes of texts.

        Args:
            texts: Texts, from a list, an array, a series or a generator; or one text. A longer text than the
                model accepts is truncated.
            ratio: The ratio, or the name of a variant. None for the default variant.
            batch_size: The largest number of texts to run at once.
            target: The runtime, as for `session`.
            **settings: Settings of the generation, with transformers' names: `max_new_tokens`, `num_beams`,
                `do_sample`, `temperature` … (`variator_export.generation.settings`). The model's
                generation_config.json has the defaults.

        Returns:
            A text for each text, in a list, or one text for one text. With `num_return_sequences`, a list of
            texts in place of each.

        Raises:
            UserError: The model does not generate text; there is no such variant or setting, or settings
                contradict each other; or a text is not a string.
        """
        model = self.text_to_text(ratio, target)
        rows = model.encoder.token_rows([texts] if isinstance(texts, str) else texts)
        found: list[Any] = model.generate(rows, batch_size, **settings)
        if settings.get("num_return_sequences") is None:
            found = one_text(found)
        return found[0] if isinstance(texts, str) else found

    def generate_stream(
        self, text: str, ratio: int | str | None = None, *, target: str = "onnxruntime", **settings: Any
    ) -> Iterator[str]:
        """The text that `generate` makes of one text, piece by piece, by greedy search or sampling.

        Raises:
            UserError: Same conditions as `generate`; or the settings ask for beams.
        """
        model = self.text_to_text(ratio, target)
        return model.stream(model.encoder.token_rows([text])[0], **settings)

    def text_to_text(
        self, ratio: int | str | None = None, target: str = "onnxruntime", session: Session | None = None
    ) -> TextToText:
        """The model from text to generated text, at a ratio; arguments are those of `text_model`.

        Raises:
            UserError: The model does not generate text, the target cannot run on this machine, or there is
                no such variant.
        """
        variant, session, encoder = self._open(ratio, target, session)
        return text_to_text(session, variant, encoder, self.manifest.backbone)

    def text_model(
        self, ratio: int | str | None = None, target: str = "onnxruntime", session: Session | None = None
    ) -> TextModel:
        """The model from text to result, at a ratio.

        Args:
            ratio: The ratio, or the name of a variant. None for the default variant.
            target: The runtime, as for `session`.
            session: A session of this bundle to run on. None for the one that the bundle keeps open.

        Raises:
            UserError: The target cannot run on this machine, or there is no such variant.
        """
        variant, session, encoder = self._open(ratio, target, session)
        return TextModel(
            lambda inputs, outputs: session.run(inputs, ratio=variant, outputs=outputs),
            encoder,
            self.manifest.backbone,
            self.config(),
        )

    def _open(
        self, ratio: int | str | None, target: str, session: Session | None
    ) -> tuple[str, Session, TextEncoder]:
        """A variant's name, the session to run it on, and the tokenizer; each is opened once."""
        variant = self.variant(self.manifest.default_variant if ratio is None else ratio)
        with self._lock:
            if session is None:
                if target not in self._sessions:
                    self._sessions[target] = self.session(target)
                session = self._sessions[target]
            if self._encoder is None:
                self._encoder = self.text_encoder()
            return variant.name, session, self._encoder

    def config(self) -> dict[str, Any]:
        """The content of the model's config.json, with the labels of label words."""
        if self._config is None:
            content = read_json_object(self.file("config.json"), "Build the bundle again.")
            self._config = self.manifest.backbone.with_labels(content)
        return self._config

    def text_encoder(self) -> TextEncoder:
        """The backbone's tokenizer."""
        for name in self.manifest.files:
            if "/" not in name and not name.endswith((".onnx", ".safetensors")):
                self.file(name)
        return TextEncoder(self.path, self.manifest.backbone.max_length)
