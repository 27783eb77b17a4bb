"""Conversion of text to token ids with the backbone's own tokenizer, without transformers."""

import itertools
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, normalizers

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.text.settings import TextSettings, read_text_settings

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
        truncated: Whether the text was longer than the limit.
    """

    ids: Sequence[int]
    type_ids: Sequence[int]
    truncated: bool = False


class TextEncoder:
    """The tokenizer of a folder, with the folder's text settings. Threads may share one.

    Attributes:
        pad_token_id: The id of the pad token.
        mask_token_id: The id of the mask token. None if the folder names none.
        settings: The folder's text settings.
        max_length: The longest text in tokens, by the settings and by the model. None if there is no limit.
    """

    def __init__(self, folder: Path, model_limit: int | None = None) -> None:
        """Read `tokenizer.json` and the text settings.

        Args:
            folder: A model's folder, or a bundle.
            model_limit: The longest input that the model accepts, in tokens. None if there is no limit.

        Raises:
            UserError: A file is missing or broken, or the folder names no pad token.
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
        self.settings: TextSettings = read_text_settings(folder)
        if self.settings.lower_case:
            own = [self._tokenizer.normalizer] if self._tokenizer.normalizer is not None else []
            self._tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        limits = [limit for limit in (self.settings.max_length, model_limit) if limit is not None]
        self.max_length = min(limits, default=None)
        self.pad_token_id = self._find_pad_token(folder)
        self.mask_token_id = self._find_token(folder, "mask_token")
        # Truncation is a property of a tokenizer, so each limit has a tokenizer of its own: switching it on a
        # shared one would change the calls of other threads.
        self._truncating: dict[int, Tokenizer] = {}
        self._lock = threading.Lock()

    def _find_token(self, folder: Path, kind: str) -> int | None:
        """Find a special token's id by its name in the tokenizer's configuration."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if not path.is_file():
                continue
            token = read_json_object(path, "Restore it from its source.").get(kind)
            content = token.get("content") if isinstance(token, dict) else token
            found = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
            if found is not None:
                return int(found)
        return None

    def _find_pad_token(self, folder: Path) -> int:
        found = self._find_token(folder, "pad_token")
        if found is not None:
            return found
        config = read_json_object(folder / "config.json", "Restore it from its source.")
        if isinstance(config.get("pad_token_id"), int):
            return int(config["pad_token_id"])
        raise UserError(
            f"{folder} names no pad token, neither in tokenizer_config.json nor in config.json.",
            "Set pad_token_id in config.json: it decides what the padding of a window holds.",
        )

    def encode(
        self,
        texts: Iterable[str],
        inputs: Sequence[str],
        max_length: int | None = None,
        *,
        pairs: Iterable[str] | None = None,
        truncate: bool = True,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Encode texts as token ids, padded on the right to the length of the longest row.

        Args:
            texts: One text for each row.
            inputs: Names of the model's inputs.
            max_length: The longest row in tokens; None for the encoder's own limit.
            pairs: The second text of each row; None if there is none.
            truncate: Whether to truncate longer texts, as sentence-transformers does. If not, they are
                refused.
            prompt_name: The prompt to put before each text; None for the folder's default prompt.
            prompt: The text of a prompt, instead of its name; empty for no prompt.

        Returns:
            int64 arrays (number of texts, longest row) by input name.

        Raises:
            UserError: There is no text, a text is not a string or not valid Unicode, the folder has no such
                prompt, or a text is longer than the limit and may not be truncated.
        """
        rows = self.token_rows(
            texts, max_length, pairs=pairs, truncate=truncate, prompt_name=prompt_name, prompt=prompt
        )
        return pad_rows(rows, inputs, self.pad_token_id)

    def token_rows(
        self,
        texts: Iterable[str],
        max_length: int | None = None,
        *,
        pairs: Iterable[str] | None = None,
        truncate: bool = True,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[TokenRow]:
        """Encode texts or pairs of texts without padding; arguments and errors are those of `encode`."""
        encodings = self.encodings(
            texts, max_length, pairs=pairs, truncate=truncate, prompt_name=prompt_name, prompt=prompt
        )
        return [token_row(encoding) for encoding in encodings]

    def encodings(
        self,
        texts: Iterable[str],
        max_length: int | None = None,
        *,
        pairs: Iterable[str] | None = None,
        truncate: bool = True,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[Encoding]:
        """Encode texts, with each token's place in its text; arguments and errors are those of `encode`."""
        limit = max_length if max_length is not None else self.max_length
        prefix = prompt if prompt is not None else self.settings.prompt(prompt_name)
        first = [prefix + text for text in as_texts(texts)]
        items = first if pairs is None else list(zip(first, as_texts(pairs), strict=True))
        tokenizer = (
            self._tokenizer
            if limit is None or not truncate
            else self._truncating_at(limit, pairs is not None)
        )
        encodings = tokenizer.encode_batch(items)
        for row, encoding in enumerate(encodings):
            if limit is not None and len(encoding.ids) > limit:
                raise UserError(
                    f"Text {row + 1} has {len(encoding.ids)} tokens; the limit is {limit}.",
                    "Shorten or split it, or truncate it (truncate=True, or without --no-truncate).",
                )
        return encodings

    def _truncating_at(self, limit: int, is_pair: bool) -> Tokenizer:
        special = self._tokenizer.num_special_tokens_to_add(is_pair)
        if limit <= special:
            raise UserError(
                f"The limit of {limit} tokens leaves no room for text beside {special} special tokens.",
                f"Give a limit of at least {special + 1}.",
            )
        with self._lock:
            if limit not in self._truncating:
                tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
                tokenizer.enable_truncation(limit)
                self._truncating[limit] = tokenizer
            return self._truncating[limit]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def plain(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return str(self._tokenizer.id_to_token(token_id))

    @property
    def vocab_size(self) -> int:
        """The number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode_plain(self, texts: Iterable[str]) -> list[tuple[list[int], list[int]]]:
        """Encode texts without special tokens; returns token ids and their start offsets in characters.

        Raises:
            UserError: A text is not valid Unicode.
        """
        encodings = self._tokenizer.encode_batch(as_texts(texts), add_special_tokens=False)
        return [(encoding.ids, [start for start, _ in encoding.offsets]) for encoding in encodings]

    def special_tokens_around_text(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        encoding = self._tokenizer.encode("a")
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]

    def sentinel_ids(self) -> list[int]:
        """The tokens of T5 for spans that are left out, in order: `<extra_id_0>`, `<extra_id_1>`, …

        mT5's vocabulary spells them with the mark of a word's beginning. Other tokenizers have none.
        """
        for mark in ("", "\u2581"):
            names = (f"{mark}<extra_id_{index}>" for index in itertools.count())
            ids = itertools.takewhile(lambda i: i is not None, map(self._tokenizer.token_to_id, names))
            if found := [int(i) for i in ids if i is not None]:
                return found
        return []

    def word_ids(self) -> np.ndarray:
        """The ids of the vocabulary in ascending order, without reserved tokens ([CLS], <pad>, [unused7])."""
        vocabulary = self._tokenizer.get_vocab()
        return np.array(sorted(i for token, i in vocabulary.items() if not _RESERVED.fullmatch(token)))


def as_texts(texts: Iterable[str]) -> list[str]:
    """Return texts from a list, an array, a series or a generator as a list of strings.

    Raises:
        UserError: There is no text, or one is not a string or not valid Unicode. The message names its row.
    """
    if isinstance(texts, str):
        raise UserError("One text was given where several are expected.", "Give a list: [text].")
    found = list(texts)
    if not found:
        raise UserError("There is no text to encode.", "Give at least one text.")
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(
                f"Text {row + 1} is {text!r}, of type {type(text).__name__}, not a string.",
                "Remove it, or replace it with a text.",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"Text {row + 1} is not valid Unicode: {error}.", "Give UTF-8 text.") from error
    return found


def token_row(encoding: Encoding) -> TokenRow:
    """The token ids of one encoded text."""
    return TokenRow(encoding.ids, encoding.type_ids, bool(encoding.overflowing))


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
