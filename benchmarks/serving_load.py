"""Load for a server: real arrival times and lengths, and a client that costs the machine little.

The client shares the machine with the server, so it speaks HTTP/1.1 itself: a library's client takes as long
for a request as the server does.
"""

import asyncio
import csv
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from variator_export.text.tokenizer import TextEncoder


@dataclass(frozen=True)
class TracePoint:
    """A request of a trace: its arrival in seconds from the first, and its length in tokens."""

    at_s: float
    tokens: int


def read_trace(path: Path, start: int, count: int, longest: int) -> list[TracePoint]:
    """A part of a trace of the Azure LLM inference data set, with lengths cut at the model's limit."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[start : start + count]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        TracePoint(at - times[0], min(max(int(row["ContextTokens"]), 3), longest))
        for at, row in zip(times, rows, strict=True)
    ]


def read_corpus(data: Path) -> str:
    """The text from which requests are made: the first files of the folder `corpus`."""
    paths = sorted((data / "corpus").glob("**/*.txt"))[:3]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def texts_of_lengths(corpus: str, encoder: TextEncoder, lengths: Sequence[int]) -> list[str]:
    """A text of each length in tokens, special tokens included, from the words of a corpus."""
    words = corpus.split()
    found, place = [], 0
    for length in lengths:
        low, high = 1, length
        window = words[place : place + length] if place + length < len(words) else words[:length]
        while low < high:  # the most words that do not exceed the length
            middle = (low + high + 1) // 2
            text = " ".join(window[:middle])
            if len(encoder.encodings([text], 10**6, truncate=False)[0].ids) <= length:
                low = middle
            else:
                high = middle - 1
        found.append(" ".join(window[:low]))
        place = (place + length) % max(len(words) - 512, 1)
    return found


@dataclass(frozen=True)
class Response:
    """A response: its status, lower-case headers, body and time in milliseconds."""

    status: int
    headers: dict[str, str]
    body: bytes
    ms: float


class Client:
    """Connections that are kept open, one for each request in flight."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, content: Any, headers: str = "") -> Response:
        """Post JSON."""
        body = json.dumps(content).encode()
        request = (
            f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{headers}\r\n"
        )
        started = time.perf_counter()
        while True:
            reused = bool(self._idle)
            reader, writer = (
                self._idle.pop()
                if reused
                else await asyncio.open_connection(self._host, self._port, limit=2**24)
            )
            try:
                writer.write(request.encode() + body)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                break
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if not reused:  # else the server closed it while it was idle, as uvicorn does after 5 s
                    raise
        found = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            found[name.lower()] = value.strip()
        answer = await reader.readexactly(int(found.get("content-length", 0)))
        ms = (time.perf_counter() - started) * 1e3
        self._idle.append((reader, writer))
        return Response(int(head[0].split()[1]), found, answer, ms)

    async def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()


@dataclass(frozen=True)
class Outcome:
    """What became of a request: the latency from when it was due, the status, and the ratios that ran."""

    ms: float
    status: int
    ratios: tuple[int, ...]


async def replay(
    address: tuple[str, int], path: str, field: str, texts: Sequence[str], due_s: Sequence[float]
) -> list[Outcome]:
    """Send each text when it is due, whether or not earlier ones are answered.

    Args:
        address: The server's host and port.
        path: The endpoint.
        field: The name of the text in the body.
        texts: A text for each request.
        due_s: The time of each request in seconds from the start.
    """
    client = Client(*address)
    started = time.perf_counter() + 0.1

    async def one(text: str, due: float) -> Outcome:
        await asyncio.sleep(max(started + due - time.perf_counter(), 0))
        response = await client.post(path, {field: text})
        ratios = response.headers.get("x-variator-ratio", "1")
        ms = (time.perf_counter() - started - due) * 1e3
        return Outcome(ms, response.status, tuple(int(ratio) for ratio in ratios.split(",")))

    outcomes = await asyncio.gather(*(one(text, due) for text, due in zip(texts, due_s, strict=True)))
    await client.close()
    return list(outcomes)


async def saturate(
    address: tuple[str, int], path: str, field: str, texts: Sequence[str], in_flight: int
) -> float:
    """Seconds to answer all texts, one in each request, with so many requests in flight."""
    client = Client(*address)
    waiting = iter(texts)

    async def worker() -> None:
        for text in waiting:
            response = await client.post(path, {field: text})
            assert response.status == 200, response

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    seconds = time.perf_counter() - started
    await client.close()
    return seconds
