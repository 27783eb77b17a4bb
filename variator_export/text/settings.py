"""Text settings of a model's folder: the longest text, lower-casing and prompts.

Whoever uses the model with sentence-transformers or transformers gets these settings without asking. A bundle
therefore keeps the files, and text is encoded accordingly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.nearest import nearest

PROMPTS_NAME = "config_sentence_transformers.json"
# sentence-transformers reads the first of these that exists (base/modules/transformer.py, 6.2).
_TRANSFORMER_NAMES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The files that hold text settings, beside the tokenizer's. They are copied into a bundle.
TEXT_SETTINGS_FILES = (*_TRANSFORMER_NAMES, PROMPTS_NAME)
# Prompts that every sentence-transformers model has, empty unless the folder says otherwise.
_EMPTY_PROMPTS = {"query": "", "document": ""}
# transformers writes int(1e30) for a tokenizer without a limit.
_NO_LIMIT = 10**9
_RESTORE = "Restore it from its source."


@dataclass(frozen=True)
class TextSettings:
    """What a folder declares about the texts that its model takes.

    Attributes:
        max_length: The longest text in tokens, special tokens included; longer texts are truncated. None if
            the folder declares no limit.
        lower_case: Whether texts are lower-cased before they reach the tokenizer.
        prompts: Texts to put before a text, by name.
        default_prompt_name: The prompt that applies unless another one is named. None for no prompt.
    """

    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def prompt(self, name: str | None = None) -> str:
        """The text of a prompt, or of the default prompt.

        Raises:
            UserError: The folder has no prompt of that name.
        """
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        known = {**_EMPTY_PROMPTS, **self.prompts}
        if name not in known:
            guess = nearest(name, list(known))
            raise UserError(
                f"The model has no prompt {name!r}; it has {', '.join(known)}.",
                f"Did you mean {guess!r}?"
                if guess
                else "Name one of them, or give the text itself: prompt=…",
            )
        return known[name]


def read_text_settings(folder: Path) -> TextSettings:
    """Read the text settings of a model's folder or of a bundle.

    The longest text is what sentence-transformers 6.2 and transformers 5 truncate to: the value in the
    Transformer module's own configuration, or else the smaller of the tokenizer's `model_max_length` and the
    model's `max_position_embeddings`.

    Raises:
        UserError: A file cannot be read, or holds a value of the wrong type.
    """
    own = next((folder / name for name in _TRANSFORMER_NAMES if (folder / name).is_file()), None)
    module = read_json_object(own, _RESTORE) if own is not None else {}
    arguments = module.get("processor_kwargs") or module.get("tokenizer_args") or {}
    declared = arguments.get("model_max_length") if isinstance(arguments, dict) else None
    if declared is None:
        declared = module.get("max_seq_length")
    max_length = _limit(declared, own) if declared is not None and own is not None else _implied(folder)
    prompts, default = _read_prompts(folder / PROMPTS_NAME)
    return TextSettings(max_length, module.get("do_lower_case") is True, prompts, default)


def _implied(folder: Path) -> int | None:
    """Return the limit that the tokenizer and the model's positions imply."""
    limits = []
    keys = {"tokenizer_config.json": "model_max_length", "config.json": "max_position_embeddings"}
    for name, key in keys.items():
        path = folder / name
        value = read_json_object(path, _RESTORE).get(key) if path.is_file() else None
        # -1 is XLNet's way to say that there is no limit.
        if value is not None and value != -1:
            limits.append(_limit(value, path))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(value: Any, path: Path) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise UserError(f"{path} limits texts to {value!r} tokens.", "Give a whole number of at least 1.")
    return None if value >= _NO_LIMIT else int(value)


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    if not path.is_file():
        return {}, None
    content = read_json_object(path, _RESTORE)
    prompts, default = content.get("prompts") or {}, content.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{path} has prompts that are not texts by name.", _RESTORE)
    prompts = {name: text or "" for name, text in prompts.items()}
    if default is not None and default not in {**_EMPTY_PROMPTS, **prompts}:
        raise UserError(
            f"{path} has the default prompt {default!r}, which is not among its prompts: "
            f"{', '.join(prompts) or 'none'}.",
            "Add the prompt, or set default_prompt_name to null.",
        )
    return prompts, default
