"""`variator-export bench` for bundles that generate text."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table

from variator_export.benchmark.schedule import TimingSettings
from variator_export.benchmark.text_benchmark import (
    TEXT_RUNTIMES,
    RequestResult,
    RequestShape,
    TextBenchmark,
    bench_text,
)
from variator_export.bundle.manifest import BackboneEntry
from variator_export.cli.output import ConsoleProgress, Output
from variator_export.core.errors import UsageError

_DEFAULT_SHAPES = ((1, 128), (1, 512), (8, 128))
_DEFAULT_NEW_TOKENS = 32
_COLUMNS = ("request ms", "first token", "further token", "tokens/s", "speed-up", "95 % interval", "allowed")


def request_shapes(
    backbone: BackboneEntry,
    shapes: Sequence[tuple[int, int]],
    new_tokens: Sequence[int],
    num_beams: Sequence[int],
) -> list[RequestShape]:
    """Every combination of what was given, with defaults for what was not, cut to the model's limits."""
    given = list(shapes) or [(batch, backbone.clamp_length(length)) for batch, length in _DEFAULT_SHAPES]
    longest = backbone.max_output_length or _DEFAULT_NEW_TOKENS
    tokens = list(new_tokens) or [min(_DEFAULT_NEW_TOKENS, longest)]
    found = (
        RequestShape(*shape, count, beams) for shape, count, beams in product(given, tokens, num_beams or [1])
    )
    return list(dict.fromkeys(found))


def run_bench(
    printer: Output,
    bundle: Path,
    shapes: Sequence[RequestShape],
    variants: Sequence[int | str],
    *,
    runtimes: Sequence[str] | None,
    backbone: str | None,
    settings: TimingSettings,
) -> TextBenchmark:
    """Time the bundle, with the options of the command.

    Raises:
        UsageError: A runtime is not one for models that generate text.
    """
    for name in runtimes or ():
        if name not in TEXT_RUNTIMES:
            raise UsageError(
                f"bench cannot time a model that generates text with the runtime {name}.",
                f"Choose from {', '.join(TEXT_RUNTIMES)}.",
            )
    with ConsoleProgress(printer) as progress:
        return bench_text(
            bundle,
            shapes,
            variants,
            runtimes=runtimes,
            backbone=backbone,
            settings=settings,
            progress=progress,
        )


def print_bench(printer: Output, result: TextBenchmark) -> None:
    """Print a table for each shape."""
    for shape in result.shapes:
        printer.table(_table(shape))
    printer.hint(
        "allowed: what the time saved up to the first token makes of the whole request; all ratios share the "
        "decoder."
    )


def _table(result: RequestResult) -> Table:
    table = Table(title=str(result.shape), title_justify="left")
    table.add_column("runtime")
    table.add_column("variant")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(row["runtime"], row["variant"], *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    plain, further = row["is_baseline"], row["token_ms"]
    return [
        f"{row['request_ms']:.1f}",
        f"{row['first_token_ms']:.1f}",
        "" if further is None else f"{further:.2f}",
        f"{row['new_tokens_per_second']:,.0f}",
        "" if plain else f"{row['speedup']:.2f}x",
        "" if plain else f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
        "" if plain else f"{row['speedup_allowed']:.2f}x",
    ]
