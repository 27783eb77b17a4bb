"""Conversion of text to token ids with the backbone's own tokenizer, without transformers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object

TOKENIZER_NAME = "tokenizer.json"
# The tokenizer files that a folder may hold. They are copied into a bundle.
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "spiece.model",
)


# Tokens that no text contains, in the notation of tokenizers: [CLS], <pad>.
_RESERVED = re.compile(r"\[.+\]|<.+>")


@dataclass(frozen=True)
class TokenRow:
    """One row of token ids, including special tokens.

    Attributes:
        ids: Token ids.
        type_ids: Token type ids: 0, or 1 for the second text of a pair if the tokenizer distinguishes it.
    """

    ids: Sequence[int]
    type_ids: Sequence[int]


class TextEncoder:
    """The tokenizer of a folder.

    Attributes:
        pad_token_id: The id of the pad token.
    """

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json`.

        Raises:
            UserError: The file is missing or broken, or the folder names no pad token.
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
            raise UserError(f"{path} is not a tokenizer: {error}.", "Restore it from its source.") from error
        # The file may enable padding to a fixed length, or silent truncation.
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
        self,
        texts: Sequence[str],
        inputs: Sequence[str],
        max_length: int | None,
        *,
        pairs: Sequence[str] | None = None,
        truncate: bool = False,
    ) -> dict[str, np.ndarray]:
        """Encode texts as token ids, padded on the right to the length of the longest row.

        Args:
            texts: One text for each row.
            pairs: The second text of each row; None if there is none.
            inputs: Names of the model's inputs.
            max_length: The model's limit in tokens; None if there is none.
            truncate: Whether to cut longer texts instead of refusing them.

        Returns:
            int64 arrays (number of texts, longest row) by input name.

        Raises:
            UserError: There is no text, a text is not valid Unicode, or a text is longer than the limit.
        """
        rows = self.token_rows(texts, max_length, pairs=pairs, truncate=truncate)
        return pad_rows(rows, inputs, self.pad_token_id)

    def token_rows(
        self,
        texts: Sequence[str],
        max_length: int | None,
        *,
        pairs: Sequence[str] | None = None,
        truncate: bool = False,
    ) -> list[TokenRow]:
        """Encode texts or pairs of texts without padding; arguments and errors are those of `encode`."""
        if isinstance(texts, str):
            raise UserError("One text was given where several are expected.", "Give a list: [text].")
        if not texts:
            raise UserError("There is no text to encode.", "Give at least one text.")
        _check_unicode(texts)
        _check_unicode(pairs or ())
        if truncate and max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        items = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        try:
            encodings = self._tokenizer.encode_batch(items)
        finally:
            self._tokenizer.no_truncation()
        for row, encoding in enumerate(encodings):
            if max_length is not None and len(encoding.ids) > max_length:
                raise UserError(
                    f"Text {row + 1} has {len(encoding.ids)} tokens; the model's limit is {max_length}.",
                    "Shorten or split it, or cut it at the limit (run --truncate).",
                )
        return [TokenRow(encoding.ids, encoding.type_ids) for encoding in encodings]

    def plain(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Encode texts without special tokens; returns token ids and their start offsets in characters.

        Raises:
            UserError: A text is not valid Unicode.
        """
        _check_unicode(texts)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [start for start, _ in encoding.offsets]) for encoding in encodings]

    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        encoding = self._tokenizer.encode("a")
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]

    def word_ids(self) -> np.ndarray:
        """The ids of the vocabulary in ascending order, without reserved tokens ([CLS], <pad>, [unused7])."""
        vocabulary = self._tokenizer.get_vocab()
        return np.array(sorted(i for token, i in vocabulary.items() if not _RESERVED.fullmatch(token)))


def _check_unicode(texts: Sequence[str]) -> None:
    for row, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"Text {row + 1} is not valid Unicode: {error}.", "Give UTF-8 text.") from error


def pad_rows(rows: Sequence[TokenRow], inputs: Sequence[str], pad_token_id: int) -> dict[str, np.ndarray]:
    """Pad rows of different length on the right, to int64 arrays (number of rows, longest row)."""
    longest = max(1, *(len(row.ids) for row in rows))
    arrays = {name: np.zeros((len(rows), longest), np.int64) for name in inputs}
    arrays["input_ids"][:] = pad_token_id
    for index, row in enumerate(rows):
        columns = slice(0, len(row.ids))
        arrays["input_ids"][index, columns] = row.ids
        arrays["attention_mask"][index, columns] = 1
        if "token_type_ids" in arrays:
            arrays["token_type_ids"][index, columns] = row.type_ids
    return arrays
