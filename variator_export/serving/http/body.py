"""The body of a request: received within its limits, then checked field by field.

The checks stop at the first thing that is wrong. A validator that collects every error would let one request
of some megabytes hold the server for seconds.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request

from variator_export.serving.http.errors import ApiError


async def receive(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body of a request.

    Args:
        request: The request.
        max_bytes: The largest body.
        timeout_s: The time in which it must have arrived.

    Raises:
        ApiError: The body is too large (413), or did not arrive in time (408).
        ClientDisconnect: The client hung up.
    """
    too_large = ApiError(
        413, f"The body is larger than {max_bytes} bytes. Send fewer texts in a request.", "body_too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(
            408,
            f"The request did not arrive within {timeout_s:g} s.",
            "timeout",
            headers={"connection": "close"},
        ) from error
    return b"".join(parts)


@dataclass(frozen=True)
class TextInput:
    """What a request asks about: texts, or rows of token ids.

    Attributes:
        texts: The texts. Empty if token ids were given.
        ids: Rows of token ids. Empty if texts were given.
    """

    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()


class Fields:
    """The fields of a body, which is a JSON object. Fields that are not asked for are ignored.

    Args:
        body: The body.
        wrong_status: The status of the answer if a field is wrong.
        max_texts: The largest number of texts in a request.

    Raises:
        ApiError: The body is not a JSON object in UTF-8. So do the methods, if a field is wrong.
    """

    def __init__(self, body: bytes, wrong_status: int, max_texts: int) -> None:
        self._status, self._max_texts = wrong_status, max_texts
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"The body is not JSON in UTF-8: {error}.", "invalid_json") from error
        if not isinstance(content, dict):
            raise ApiError(wrong_status, "The body is not a JSON object.", "invalid_value")
        self._content = content

    def text(self, name: str) -> str | None:
        """A string, or None if the field is missing or null."""
        found = self._content.get(name)
        if found is not None and not isinstance(found, str):
            raise self.wrong(name, "a string")
        return found

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        found = self._content.get(name)
        if found is not None and not isinstance(found, bool):
            raise self.wrong(name, "true or false")
        return default if found is None else found

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of several strings; the first if the field is missing."""
        found = self._content.get(name)
        if found is not None and found not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return choices[0] if found is None else str(found)

    def size(self, name: str, most: int) -> int | None:
        """A number of dimensions from 1 to the most that there are, or None if the field is missing."""
        found = self._content.get(name)
        if found is None:
            return None
        if type(found) is not int or not 1 <= found <= most:
            raise self.wrong(name, f"a whole number from 1 to {most}, which embeddings have")
        return found

    def texts_or_ids(self, name: str) -> TextInput:
        """A string, strings, token ids, or lists of token ids."""
        found = self._required(name)
        forms = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
        if isinstance(found, str):
            return TextInput(texts=[found])
        if not isinstance(found, list):
            raise self.wrong(name, forms)
        if found and type(found[0]) is int:
            if all(type(value) is int for value in found):
                return TextInput(ids=[found])
            raise self.wrong(name, forms)
        self._count(name, found)
        if isinstance(found[0], str) and all(isinstance(value, str) for value in found):
            return TextInput(texts=found)
        rows = isinstance(found[0], list) and all(isinstance(row, list) and row for row in found)
        if rows and all(type(value) is int for row in found for value in row):
            return TextInput(ids=found)
        raise self.wrong(name, forms)

    def rows(self, name: str) -> tuple[list[list[str]], bool]:
        """Rows of one or two strings, and whether a single one was given.

        A string or two are a single row; a list of lists of one or two strings are several.
        """
        found = self._required(name)
        forms = "a string, a pair of strings, or a list of lists of one or two strings"
        if isinstance(found, str):
            return [[found]], True
        if not isinstance(found, list):
            raise self.wrong(name, forms)
        self._count(name, found)
        single = isinstance(found[0], str)
        rows = [found] if single else found
        for row in rows:
            right = (
                isinstance(row, list) and 1 <= len(row) <= 2 and all(isinstance(text, str) for text in row)
            )
            if not right:
                raise self.wrong(name, forms)
        return rows, single

    def wrong(self, name: str, forms: str) -> ApiError:
        """The error of a field that is not what it must be."""
        return ApiError(self._status, f"{name} must be {forms}.", "invalid_value", name)

    def _required(self, name: str) -> Any:
        if self._content.get(name) is None:
            raise ApiError(self._status, f"The field {name} is missing.", "missing_field", name)
        return self._content[name]

    def _count(self, name: str, found: Sequence[object]) -> None:
        if not found:
            raise ApiError(400, "There is no text. Send at least one.", "empty_input", name)
        if len(found) > self._max_texts:
            raise ApiError(
                413,
                f"The request has {len(found)} texts; at most {self._max_texts} are allowed. Send several "
                "requests.",
                "too_many_texts",
                name,
            )
