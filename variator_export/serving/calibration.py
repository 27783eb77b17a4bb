"""Calibration: the time of batches on this machine, before the first request."""

import time
from collections.abc import Callable

import numpy as np

from variator_export.serving.cost_model import CostModel, Measurement
from variator_export.serving.variants import Variants

# Rows and lengths that tell the terms of the cost model apart (calls, tokens, and pairs of tokens), the most
# telling first: a slow model has no time for all of them.
_SHAPES = ((1, 16), (1, 512), (4, 128), (16, 16), (1, 128), (16, 64), (4, 512), (1, 64), (16, 128))
_FEWEST_SHAPES = 3
# Batches this much slower per token than the best are not worth their lower latency.
_FULL_SHARE = 0.95
_BUDGETS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def calibrate(
    run: Callable[[str, int, int], object], variants: Variants, longest: int, seconds: float
) -> tuple[CostModel, list[Measurement]]:
    """Measure batches of every variant, in turns, and fit the cost model to the medians.

    Args:
        run: Runs a batch: the variant's name, rows and length.
        variants: The variants.
        longest: The longest row of the model in tokens.
        seconds: The time for it. Three shapes are measured however long that takes.

    Returns:
        The model, and the medians that it was fitted to.
    """
    ends = time.monotonic() + seconds
    times: dict[tuple[str, int, int], list[float]] = {}
    for shape in _shapes(longest):
        if len(times) >= _FEWEST_SHAPES * len(variants.all) and time.monotonic() > ends:
            break
        for variant in variants.all:
            run(variant.name, *shape)  # reserves memory
            times[(variant.name, *shape)] = [_timed(run, variant.name, *shape)]
    while time.monotonic() < ends:
        for key, found in times.items():
            found.append(_timed(run, *key))
    medians = [Measurement(*key, float(np.median(found))) for key, found in times.items()]
    return CostModel.fit(medians), medians


def _timed(run: Callable[[str, int, int], object], name: str, rows: int, length: int) -> float:
    """The duration of a batch in milliseconds."""
    started = time.perf_counter()
    run(name, rows, length)
    return (time.perf_counter() - started) * 1e3


def token_budget(cost: CostModel, variants: Variants, length: int) -> int:
    """The smallest number of tokens in a batch that is nearly as fast per token as any.

    A larger batch gains nothing and lets others wait for longer.

    Args:
        cost: The cost model.
        variants: The variants. The fastest counts: it runs under load.
        length: A usual length of rows in tokens.
    """
    name = variants.all[-1].name

    def rate(budget: int) -> float:
        rows = max(budget // length, 1)
        return rows * length / cost.batch_ms(name, rows, length)

    best = max(rate(budget) for budget in _BUDGETS)
    return next(budget for budget in _BUDGETS if rate(budget) >= _FULL_SHARE * best)


def _shapes(longest: int) -> list[tuple[int, int]]:
    """The shapes to measure, none of them longer than the model allows."""
    return list(dict.fromkeys((rows, min(length, longest)) for rows, length in _SHAPES))
