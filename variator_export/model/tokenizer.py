"""Text to token ids with the backbone's own tokenizer, without transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object

TOKENIZER_NAME = "tokenizer.json"
# What a folder may hold for its tokenizer; copied into a bundle.
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "spiece.model",
)


class TextEncoder:
    """The tokenizer of a folder.

    Attributes:
        pad_token_id: The id of the pad token.
    """

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json`.

        Raises:
            UserError: It is missing or broken.
        """
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            raise UserError(
                f"{folder} has no {TOKENIZER_NAME}; graphs are verified on real text, which needs it.",
                "Save one: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER)",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path} is no tokenizer: {error}.", "Restore it from its source.") from error
        # The file may ask for padding to a fixed length or for silent truncation.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_token_id = self._find_pad_token(folder)

    def _find_pad_token(self, folder: Path) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if not path.is_file():
                continue
            token = read_json_object(path, "Restore it from its source.").get("pad_token")
            content = token.get("content") if isinstance(token, dict) else token
            found = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
            if found is not None:
                return int(found)
        config = read_json_object(folder / "config.json", "Restore it from its source.")
        if isinstance(config.get("pad_token_id"), int):
            return int(config["pad_token_id"])
        raise UserError(
            f"{folder} names no pad token, neither in tokenizer_config.json nor in config.json.",
            "Set pad_token_id in config.json: it decides what the padding of a window holds.",
        )

    def encode(
        self, texts: Sequence[str], inputs: Sequence[str], max_length: int | None, *, truncate: bool = False
    ) -> dict[str, np.ndarray]:
        """Token ids of texts, padded on the right to the longest.

        Args:
            texts: One text for each row.
            inputs: Which inputs the model takes.
            max_length: The model's limit in tokens; None: there is none.
            truncate: Cut longer texts instead of refusing them.

        Returns:
            int64 arrays (number of texts, longest) by input name.

        Raises:
            UserError: There is no text, or a text is longer than the limit.
        """
        if isinstance(texts, str):
            raise UserError("One text was given where several are expected.", "Give a list: [text].")
        if not texts:
            raise UserError("There is no text to encode.", "Give at least one text.")
        for row, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"Text {row + 1} is no valid Unicode: {error}.", "Give UTF-8 text."
                ) from error
        if truncate and max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        try:
            encodings = self._tokenizer.encode_batch(list(texts))
        finally:
            self._tokenizer.no_truncation()
        for row, encoding in enumerate(encodings):
            if max_length is not None and len(encoding.ids) > max_length:
                raise UserError(
                    f"Text {row + 1} has {len(encoding.ids)} tokens; the model's limit is {max_length}.",
                    "Shorten or split it, or cut it off at the limit (run --truncate).",
                )
        longest = max(1, *(len(encoding.ids) for encoding in encodings))
        arrays = {name: np.zeros((len(texts), longest), np.int64) for name in inputs}
        arrays["input_ids"][:] = self.pad_token_id
        for row, encoding in enumerate(encodings):
            columns = slice(0, len(encoding.ids))
            arrays["input_ids"][row, columns] = encoding.ids
            arrays["attention_mask"][row, columns] = encoding.attention_mask
            if "token_type_ids" in arrays:
                arrays["token_type_ids"][row, columns] = encoding.type_ids
        return arrays
