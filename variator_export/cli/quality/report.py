"""`variator-export report`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.core.errors import UsageError
from variator_export.reporting.bundle_report import report
from variator_export.reporting.recommendation import Goals


def report_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of the report. Default: reports/report.html in the bundle."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the plots to this folder, as PNG and SVG.")
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Recommend a variant that loses at most this share of every metric that counts: 1% or 0.01.",
        ),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="Recommend a variant whose median call takes at most this many milliseconds."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="BxS", help="The shape of --max-latency. Default: the largest that was timed."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A metric that counts; may be repeated. Default: each task's main metric, and for "
            "embeddings also cosine and recall_at_10.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Write a one-page report on a bundle: its contents, verification, speed and quality.

    The page is self-contained: it opens from disk without a network, also on a phone, in light and dark. It
    shows the results that `verify`, `bench` and `evaluate` have stored in the bundle.

    **Examples**

    `variator-export report artifacts/minilm`

    `variator-export report artifacts/minilm --output minilm.html --plots plots/`

    `variator-export report artifacts/minilm --max-loss 2% --max-latency 40 --shape 8x128 --metric spearman`
    """
    printer = Output(format)
    result = report(bundle, output, plots=plots, goals=_goals(max_loss, max_latency, shape, metric))
    if printer.is_json:
        printer.document(
            {
                "page": str(result.page),
                "plots": [str(path) for path in result.plots],
                "missing": list(result.missing),
                "recommendations": [asdict(found) for found in result.recommendations],
                "dominated": [asdict(found) for found in result.dominated],
                "warnings": list(result.warnings),
            }
        )
        return
    printer.text(f"written: {result.page}")
    for path in result.plots:
        printer.text(f"written: {path}")
    for line in [*result.recommended, *(found.text() for found in result.dominated)]:
        printer.text(line)
    for warning in result.warnings:
        printer.hint(f"warning: {warning}")
    for command in result.missing:
        printer.hint(f"to add to the report, run: {command}")


def _goals(
    max_loss: str | None, max_latency: float | None, shape: str | None, metrics: list[str] | None
) -> Goals | None:
    """Return what the options ask for. None if they ask for nothing."""
    if max_loss is None and max_latency is None:
        for option, value in (("--shape", shape), ("--metric", metrics)):
            if value:
                raise UsageError(f"{option} needs a goal.", "Give --max-loss or --max-latency.")
        return None
    if max_latency is not None and not max_latency > 0:
        raise UsageError(
            f"--max-latency {max_latency:g} is not above 0.", "Give milliseconds, for example 40."
        )
    at = None if shape is None else options.parse_shape(shape)
    loss = None if max_loss is None else options.parse_loss(max_loss)
    return Goals(loss, max_latency, at, tuple(metrics or ()))
