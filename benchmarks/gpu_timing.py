"""Times on a GPU: of the work itself, by events around each replay, and of a caller who waits for it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_BLOCKS = 5
# More than any cache of a GPU holds; overwriting it leaves nothing of the model in the cache.
_FLUSH_BYTES = 512 << 20
_WARMUP = 3


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs are on the device.

    Attributes:
        enqueue: Puts the run on the stream; on a CPU, runs.
        stream: The stream; None on a CPU.
        graph: Whether the run is a CUDA graph; otherwise why it is none.
    """

    enqueue: Callable[[], object]
    stream: Any
    graph: bool | str


def as_graph(enqueue: Callable[[], object]) -> Prepared:
    """Record what a function of PyTorch enqueues as a CUDA graph; if that fails, with PyTorch's reason."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            enqueue()
    except Exception as error:  # of the operators inside
        torch.cuda.synchronize()
        return Prepared(_on(stream, enqueue), stream, f"{type(error).__name__}: {str(error).strip()[:200]}")
    return Prepared(_on(stream, graph.replay), stream, True)


def _on(stream: Any, enqueue: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.cuda.stream(stream):
            enqueue()

    return run


def time_in_turns(prepared: Mapping[str, Prepared], replays: int) -> dict[str, dict[str, Any]]:
    """Time several runs in turns, in blocks.

    Returns:
        For each: whether it is a CUDA graph, `wall_ms` until a caller has the result, and on a GPU `warm_ms`
        and `cold_ms` between events around a replay.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in prepared}
    each = max(replays // _BLOCKS, 1)
    flush = None
    if any(run.stream is not None for run in prepared.values()):
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(_BLOCKS):
        for name, run in prepared.items():
            for _ in range(_WARMUP):
                run.enqueue()
            _wait(run)
            if flush is not None:
                found[name].setdefault("warm_ms", []).extend(_events(run, each, None))
                found[name].setdefault("cold_ms", []).extend(_events(run, each, flush))
            found[name].setdefault("wall_ms", []).extend(_wall(run, each))
    return {
        name: {"graph": prepared[name].graph, **{kind: _summary(times) for kind, times in own.items()}}
        for name, own in found.items()
    }


def _events(run: Prepared, count: int, flush: torch.Tensor | None) -> list[float]:
    pairs = []
    for _ in range(count):
        if flush is not None:
            with torch.cuda.stream(run.stream):
                flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(run.stream)
        run.enqueue()
        last.record(run.stream)
        pairs.append((first, last))
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in pairs]


def _wall(run: Prepared, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run.enqueue()
        _wait(run)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _wait(run: Prepared) -> None:
    if run.stream is not None:
        run.stream.synchronize()


def _summary(times: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high), "count": len(times)}
