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
        typer.Option(metavar="FILE", help="The page; default: reports/report.html in the bundle."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the pictures here too, as PNG and SVG.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Write one page about a bundle: what is in it, whether it is verified, what it gains and loses.

    It holds everything itself: it opens from disk, without a network, on a phone, light and dark. It shows
    what `verify`, `bench` and `evaluate` have stored in the bundle.

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
        printer.hint(f"the page would show more after: {command}")
