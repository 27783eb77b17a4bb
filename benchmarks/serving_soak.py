"""A server at full load for half an hour: memory, and every answer compared with the session's own.

    python benchmarks/serving_soak.py --bundle artifacts/minilm --output benchmarks/results/serving-soak.json

Clients send random texts, one to five in a request, some with a pinned ratio, some hanging up before the
answer. Each vector is compared with the one that the session gives for that text alone at the ratio that the
response names.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common import describe, write_result
from serving import serving
from serving_load import Client
from variator_export.sessions import Bundle

_CLIENTS = 48
_TEXTS = 300
# Rows run padded in batches of others: float32 sums in another order.
_TOLERANCE = 2e-5


def memory_mb(pid: int) -> float:
    """The resident memory of a process in MB."""
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1e3


async def soak(
    address: tuple[str, int], texts: list[str], known: dict[int, np.ndarray], seconds: float, pid: int
) -> dict[str, Any]:
    """Load for so many seconds."""
    counts: Counter[str] = Counter()
    worst = 0.0
    memory: list[tuple[float, float]] = []
    ends = time.monotonic() + seconds
    started = time.monotonic()

    async def client(seed: int) -> None:
        nonlocal worst
        rng = random.Random(seed)
        own = Client(*address)
        while time.monotonic() < ends:
            chosen = [rng.randrange(len(texts)) for _ in range(rng.randint(1, 5))]
            pinned = rng.choice([*known, None, None, None])
            headers = "" if pinned is None else f"x-variator-ratio: {pinned}\r\n"
            ask = own.post("/embed", {"inputs": [texts[i] for i in chosen], "normalize": False}, headers)
            if rng.random() < 0.02:  # hang up
                task = asyncio.ensure_future(ask)
                await asyncio.sleep(rng.random() * 0.05)
                task.cancel()
                await own.close()
                own = Client(*address)
                counts["hung up"] += 1
                continue
            response = await ask
            counts[str(response.status)] += 1
            if response.status == 429:
                await asyncio.sleep(rng.random() * 0.2)
                continue
            ratios = [int(ratio) for ratio in response.headers["x-variator-ratio"].split(",")]
            assert pinned is None or ratios == [pinned]
            for vector, index in zip(json.loads(response.body), chosen, strict=True):
                # Of several ratios in a response, one must be the row's.
                error = min(float(np.abs(np.array(vector) - known[ratio][index]).max()) for ratio in ratios)
                worst = max(worst, error)
                counts["vectors"] += 1
                counts["wrong"] += error > _TOLERANCE
        await own.close()

    async def watch() -> None:
        while time.monotonic() < ends:
            memory.append((round(time.monotonic() - started, 1), memory_mb(pid)))
            await asyncio.sleep(min(10, seconds / 20))

    await asyncio.gather(watch(), *(client(seed) for seed in range(_CLIENTS)))
    third = len(memory) // 3
    first, last = (np.median([mb for _, mb in part]) for part in (memory[third : 2 * third], memory[-third:]))
    return {
        "seconds": round(time.monotonic() - started, 1),
        "counts": dict(counts),
        "largest_error": worst,
        "memory_mb": {"second_third": float(first), "last_third": float(last), "all": memory},
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    rng = random.Random(0)
    words = [
        "ferry",
        "cat",
        "rain",
        "mountain",
        "harbour",
        "night",
        "letter",
        "garden",
        "seven",
        "bright",
        "under",
    ]
    texts = [" ".join(rng.choices(words, k=rng.choice([3, 8, 20, 60, 120]))) for _ in range(_TEXTS)]
    known = {v.ratio: bundle.embed(texts, v.ratio, batch_size=1) for v in bundle.manifest.variants}
    with serving(options.bundle) as (host, port, pid):
        found = asyncio.run(soak((host, port), texts, known, options.minutes * 60, pid))
    write_result(options.output, describe("starlette", "uvicorn") | found)
    grown = found["memory_mb"]["last_third"] - found["memory_mb"]["second_third"]
    sys.exit(found["counts"].get("wrong", 0) > 0 or grown > 20)


if __name__ == "__main__":
    main()
