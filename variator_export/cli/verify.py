"""`variator-export verify`."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from variator_export.building.plan import parse_ratio
from variator_export.cli import completion, options
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.cli.verification_files import junit_xml, markdown
from variator_export.core.errors import NumbersDisagreeError, UsageError
from variator_export.core.json_file import write_text
from variator_export.engines.targets import TARGETS, engine_targets
from variator_export.verification.bundle_verification import Verification, store_verification, verify
from variator_export.verification.verified_graph import AS_IT_IS

_SHOWN_FAILURES = 10


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    ratio: options.OnlyRatiosOption = None,
    variant: options.OnlyVariantsOption = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="T",
            help=f"onnxruntime: the graphs, on the CPU; {' or '.join(engine_targets())}: the engines, on "
            "this machine's GPU, which `run` accepts after they have passed; another target of `run`: the "
            "graph of each ratio there.",
            autocompletion=completion.run_targets,
        ),
    ] = "onnxruntime",
    reference: Annotated[
        str,
        typer.Option(
            metavar="R",
            help="eager: eager PyTorch, which needs torch and the backbone; stored: its outputs from when "
            "the bundle was built; auto: eager if torch and transformers are installed, otherwise stored.",
        ),
    ] = "auto",
    backbone: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The backbone. Default: its source at build time."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip the shapes of the engines' optimization profiles.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also verify graphs at the largest shape of each optimization profile, which takes most of "
            "the time. Engines are always verified there, unless --quick is given.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            metavar="N",
            help="Draw the random tokens, and 12 more shapes, from this seed: another one every night. "
            "Default: the recipe's seed, and the fixed shapes alone.",
        ),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Find the first PyTorch module at which a failing graph or engine goes wrong."
        ),
    ] = False,
    reproduction: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder in which --bisect writes a standalone reproduction of each fault."
        ),
    ] = Path("reproduction"),
    lean_runtime: options.LeanRuntimeOption = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML, for CI.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as Markdown.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Verify that the graphs or engines of a bundle compute what eager PyTorch computes.

    The limit is a multiple of eager PyTorch's own rounding error. In addition, the rows of a batch must not
    depend on each other, on their order or on padding. The exit code is 3 if a check fails.

    **Examples**

    `variator-export verify artifacts/minilm`

    `variator-export verify artifacts/minilm --ratio 4 --junit verification.xml`

    `variator-export verify artifacts/minilm --bisect --reproduction fault/`

    `variator-export verify artifacts/minilm --full --seed 20261126` tries more shapes.

    `variator-export verify artifacts/minilm --target tensorrt` verifies engines, on a GPU.

    `variator-export verify artifacts/minilm --reference stored` needs neither torch nor the backbone.
    """
    options.choose("--target", target, TARGETS.names())
    options.choose("--reference", reference, ("auto", "eager", "stored"))
    if reference == "stored" and bisect:
        raise UsageError("--bisect runs eager PyTorch.", "Leave out --reference stored.")
    if reference == "stored" and backbone is not None:
        raise UsageError("--reference stored does not use a backbone.", "Leave out one of the two.")
    if quick and full:
        raise UsageError("--quick and --full were both given.", "Give one of them.")
    chosen: list[int | str] = [*(parse_ratio(k) for k in ratio or ()), *(variant or ())]
    printer = Output(format)
    with ConsoleProgress(printer) as progress:
        result = verify(
            bundle,
            chosen,
            target=target,
            reference=cast(Any, reference),
            backbone=backbone,
            seed=seed,
            profile_shapes="none" if quick else "all" if full else None,
            reproduction=reproduction if bisect else None,
            lean_runtime=lean_runtime,
            progress=progress,
        )
    for path, content in ((junit, junit_xml), (summary, markdown)):
        if path is not None:
            write_text(path, content(result))
    if printer.is_json:
        printer.document(result.as_dict())
    else:
        _print(printer, result)
    with printer.warning():  # the exit code depends on the result, which is printed already
        store_verification(result)
    if not result.passed:
        raise typer.Exit(NumbersDisagreeError.exit_code)


def _print(printer: Output, result: Verification) -> None:
    table = Table(title=f"Compared with {result.reference}", title_justify="left")
    for name in ("variant", "graph", "check"):
        table.add_column(name)
    for name in ("cases", "worst", "allowed", ""):
        table.add_column(name, justify="right")
    for row in result.summary():
        worst = "-" if row.worst is None else f"{row.worst:.2f}"
        verdict = "passed" if row.failed == 0 else f"{row.failed} FAILED"
        table.add_row(row.variant, row.graph, row.check, str(row.count), worst, f"{row.allowed:g}", verdict)
    printer.table(table)
    if result.ran != AS_IT_IS:
        printer.hint(f"{'The engines' if result.gpu else 'The graphs'} ran {result.ran}.")
    printer.hint(result.unit)
    if result.profile_shapes == "usual":
        printer.hint("The largest shape of each optimization profile was left out; --full verifies it too.")
    for left in (left for found in result.left_out.values() for left in found):
        printer.hint(f"LEFT OUT: {left}")
    for name, parting in ((name, p) for name, found in result.partings.items() for p in found):
        printer.hint(f"PARTS: {name}, {parting}")
    failures = result.failures
    for finding in failures[:_SHOWN_FAILURES]:
        printer.hint(f"FAILED: {finding}")
    if len(failures) > _SHOWN_FAILURES:
        printer.hint(f"... and {len(failures) - _SHOWN_FAILURES} more; --format json shows them all.")
    for name, why in result.imprecise.items():
        printer.hint(f"FAILED: {name}: {why}")
    for loss in (loss for found in result.losses.values() for loss in found):
        printer.hint(f"{'' if loss.passed else 'FAILED: '}{loss}")
    for bisection in result.bisections:
        printer.hint(f"BISECTED: {bisection}")
