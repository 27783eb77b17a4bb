"""`variator-export report`."""

from pathlib import Path
from typing import Annotated

import typer

from variator_export.cli.output import Format, Output
from variator_export.reporting.bundle_report import report


def report_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of the report. Default: reports/report.html in the bundle."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the plots to this folder, as PNG and SVG.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Write a one-page report on a bundle: its contents, verification, speed and quality.

    The page is self-contained: it opens from disk without a network, also on a phone, in light and dark. It
    shows the results that `verify`, `bench` and `evaluate` have stored in the bundle.

    **Examples**

    `variator-export report artifacts/minilm`

    `variator-export report artifacts/minilm --output minilm.html --plots plots/`
    """
    printer = Output(format)
    result = report(bundle, output, plots=plots)
    if printer.is_json:
        printer.document(
            {
                "page": str(result.page),
                "plots": [str(path) for path in result.plots],
                "missing": list(result.missing),
            }
        )
        return
    printer.text(f"written: {result.page}")
    for path in result.plots:
        printer.text(f"written: {path}")
    for command in result.missing:
        printer.hint(f"to add to the report, run: {command}")
