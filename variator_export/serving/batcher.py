"""The rows that wait, and the choice of those that run together."""

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from variator_export.engines.batches import longest_beside

# How many rows on either side a batch looks at, in batches: choosing takes no longer for a long queue.
_FARTHEST = 4
# A heap is cleared of rows that no longer wait when it is this many times as long as the queue.
_STALE = 8


@dataclass(eq=False, slots=True)
class Row:
    """One text that waits.

    Attributes:
        length: The number of tokens.
        allowed: The levels that it may run at, ascending (`Variants`).
        arrived_ms: The time of its arrival.
        deadline_ms: The time by which it should be answered.
        payload: What the caller needs to run and to answer it.
    """

    length: int
    allowed: tuple[int, ...]
    arrived_ms: float
    deadline_ms: float
    payload: Any = None
    _key: tuple[int, int] = field(default=(0, 0), repr=False)


@dataclass(slots=True)
class Load:
    """A sum over rows.

    Attributes:
        rows: The number of rows.
        tokens: The number of their tokens.
        pairs: The sum of their squared lengths.
    """

    rows: int = 0
    tokens: int = 0
    pairs: int = 0

    def add(self, row: Row, sign: int = 1) -> None:
        """Add a row, or take it away."""
        self.rows += sign
        self.tokens += sign * row.length
        self.pairs += sign * row.length * row.length


class Batcher:
    """A queue of rows that gives out batches.

    A batch always holds the row whose deadline comes first, so that no row waits for ever. Beside it run rows
    of like length, so that little of the batch is padding: of these, again those whose deadlines come first,
    so that a row does not wait for rows that came after it.

    Args:
        max_tokens: The largest number of padded tokens in a batch. One row may exceed it alone.
        max_rows: The largest number of rows in a batch.
    """

    def __init__(self, max_tokens: int, max_rows: int) -> None:
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self._by_length: list[tuple[int, int, Row]] = []
        self._earliest: list[tuple[float, int, Row]] = []
        self._latest: list[tuple[float, int, Row]] = []
        self._count = itertools.count()
        self._loads: dict[tuple[int, ...], Load] = {}

    def __len__(self) -> int:
        return len(self._by_length)

    def __iter__(self) -> Iterator[Row]:
        return (row for _, _, row in self._by_length)

    def add(self, row: Row) -> None:
        """Let a row wait."""
        number = next(self._count)
        row._key = (row.length, number)
        insort(self._by_length, (row.length, number, row))
        heapq.heappush(self._earliest, (row.deadline_ms, number, row))
        heapq.heappush(self._latest, (-row.deadline_ms, number, row))
        self._loads.setdefault(row.allowed, Load()).add(row)

    def discard(self, row: Row) -> bool:
        """Take a row out, if it still waits. Returns whether it did."""
        place = self._place(row)
        if place is None:
            return False
        del self._by_length[place]
        load = self._loads[row.allowed]
        load.add(row, -1)
        if not load.rows:
            del self._loads[row.allowed]
        for heap in (self._earliest, self._latest):
            # Rows that no longer wait leave a heap only at its top. They must not pile up below.
            if len(heap) > _STALE * (len(self._by_length) + 1):
                heap[:] = [entry for entry in heap if self._place(entry[2]) is not None]
                heapq.heapify(heap)
        return True

    def head(self) -> Row | None:
        """The row whose deadline comes first."""
        return self._first(self._earliest)

    def last_deadline_ms(self) -> float | None:
        """The latest deadline of the rows. None if there is none."""
        row = self._first(self._latest)
        return None if row is None else row.deadline_ms

    def loads(self) -> Iterator[tuple[tuple[int, ...], Load]]:
        """What waits, by the levels that are allowed."""
        return iter(self._loads.items())

    def total(self) -> Load:
        """All that waits."""
        total = Load()
        for load in self._loads.values():
            total.rows += load.rows
            total.tokens += load.tokens
            total.pairs += load.pairs
        return total

    def peek(
        self, fits: Callable[[Row], bool], in_time: Callable[[int, int], bool] = lambda *_: True
    ) -> list[Row]:
        """The rows that would run next: the head, and rows of like length that may run with it.

        Args:
            fits: Whether a row may run in the same batch as the head.
            in_time: Whether a batch of so many rows, padded to so many tokens, is short enough. The head
                alone always is.
        """
        head = self.head()
        if head is None:
            return []
        place = self._place(head)
        assert place is not None
        batch, shortest, longest = [head], head.length, head.length
        for row in sorted(self._beside(place, head), key=lambda row: row.deadline_ms):
            if len(batch) == self.max_rows:
                break
            new_shortest, new_longest = min(shortest, row.length), max(longest, row.length)
            count = len(batch) + 1
            alike = new_longest <= longest_beside(new_shortest) and new_longest * count <= self.max_tokens
            if alike and fits(row) and in_time(count, new_longest):
                batch.append(row)
                shortest, longest = new_shortest, new_longest
        return batch

    def _beside(self, place: int, head: Row) -> Iterator[Row]:
        """The rows around a place whose length is near enough to run beside its row, on either side."""
        most = _FARTHEST * self.max_rows
        for _, _, row in self._by_length[place + 1 : place + 1 + most]:
            if row.length > longest_beside(head.length):
                break
            yield row
        for _, _, row in reversed(self._by_length[max(place - most, 0) : place]):
            if head.length > longest_beside(row.length):
                break
            yield row

    def _place(self, row: Row) -> int | None:
        """The place of a row among the rows by length. None if it does not wait."""
        place = bisect_left(self._by_length, row._key, key=lambda entry: entry[:2])
        there = place < len(self._by_length) and self._by_length[place][2] is row
        return place if there else None

    def _first(self, heap: list[tuple[float, int, Row]]) -> Row | None:
        """The first row of a heap that still waits."""
        while heap and self._place(heap[0][2]) is None:
            heapq.heappop(heap)
        return heap[0][2] if heap else None
