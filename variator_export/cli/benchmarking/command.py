"""`variator-export bench`."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from variator_export.benchmark.bundle_benchmark import Benchmark, ShapeResult, bench
from variator_export.benchmark.runtimes import OWN_RUNTIMES, RUNTIMES
from variator_export.benchmark.schedule import DEFAULT_WINDOW, TimingSettings
from variator_export.benchmark.speed_table import SPEED_COLUMNS, speed_cells
from variator_export.benchmark.stored import store_benchmark
from variator_export.building.plan import parse_ratio
from variator_export.bundle.manifest import BackboneEntry, read_manifest
from variator_export.bundle.quality_report import counted_losses, counted_metrics
from variator_export.cli import options
from variator_export.cli.benchmarking.text import print_bench, request_shapes, run_bench
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.core.errors import TooSlowError, UsageError
from variator_export.core.json_file import write_json

_DEFAULT_SHAPES = ("1x32", "1x128", "8x128", "32x128")
# Number of modules shown in the table of a profile.
_PROFILE_ROWS = 16


def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxS",
            help=f"Rows x tokens per row; may be repeated. Default: {', '.join(_DEFAULT_SHAPES)}, "
            "with tokens cut to the model's limit.",
        ),
    ] = None,
    ratio: options.OnlyRatiosOption = None,
    variant: options.OnlyVariantsOption = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Generated tokens of a request, for a bundle that generates text; may be repeated. Default: "
            "32.",
        ),
    ] = None,
    num_beams: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Beams of a request; may be repeated. Default: 1."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R",
            help=f"A runtime to time; may be repeated: {', '.join(RUNTIMES)}. Default: all that are "
            "installed and run on the CPU.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The backbone, for PyTorch. Default: its source at build time."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads per runtime. Default: each runtime's own default."),
    ] = None,
    openings: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Sessions opened anew and timed per runtime and variant (PyTorch: one); 1 is quick.",
        ),
    ] = TimingSettings.openings,
    block_seconds: Annotated[
        float, typer.Option(metavar="S", help="Seconds that one runtime and variant runs in each turn.")
    ] = TimingSettings.block_seconds,
    window: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Rounds compared with as many before them, to see if medians are stable."
        ),
    ] = DEFAULT_WINDOW,
    tolerance: Annotated[
        float, typer.Option(metavar="X", help="Largest relative difference between stable medians.")
    ] = TimingSettings.tolerance,
    max_rounds: Annotated[
        int,
        typer.Option(
            min=4,
            metavar="N",
            help="Rounds after which an opening ends in any case, reported as not settled.",
        ),
    ] = TimingSettings.max_rounds,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show in which modules each graph spends its time.")
    ] = False,
    allow_unverified: options.AllowUnverifiedOption = False,
    lean_runtime: options.LeanRuntimeOption = None,
    fail_under: Annotated[
        float | None,
        typer.Option(metavar="X", help="Exit with code 4 if the lower bound of a speed-up is below X."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result to this file, as JSON.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Time every ratio of a bundle against the alternatives without plugins.

    Runtimes and variants take turns, in blocks of runs, until their medians are stable. Every session is
    opened and timed several times (an "opening" each), because timings differ between openings. A speed-up
    is over the fastest run without plugins of the same family of runtimes. It has a 95 % interval and stands
    beside the speed-up that the saved multiply-accumulates allow.

    Of a bundle that generates text, whole requests are timed, the first token and each further one, in eager
    PyTorch, on ONNX Runtime and in CTranslate2. There a speed-up is over ratio 1 on the same runtime.

    **Examples**

    `variator-export bench artifacts/minilm --shape 1x128 --shape 32x128`

    `variator-export bench artifacts/minilm --ratio 4 --runtime onnxruntime --fail-under 1.5` needs no torch.

    `variator-export bench artifacts/flan --shape 1x512 --new-tokens 16 --new-tokens 64 --num-beams 4`
    """
    for name in runtime or ():
        options.choose("--runtime", name, tuple(RUNTIMES))
    for name, value in (("--block-seconds", block_seconds), ("--tolerance", tolerance)):
        if not value > 0:
            raise UsageError(f"{name} {value:g} is not above 0.", f"Leave out {name}.")
    chosen: list[int | str] = [*(parse_ratio(k) for k in ratio or ()), *(variant or ())]
    if fail_under is not None:
        _check_gate(fail_under, runtime, bundle, chosen)
    printer = Output(format)
    shapes = [options.parse_shape(text) for text in shape or ()]
    settings = TimingSettings(openings, block_seconds, window, tolerance, max_rounds, threads)
    entry = read_manifest(bundle).backbone
    if entry.generates:
        if profile or allow_unverified or lean_runtime:
            raise UsageError(
                f"{bundle} generates text: bench does not profile it, and does not time its engines yet.",
                "Leave out --profile, --allow-unverified and --lean-runtime.",
            )
        requests = request_shapes(entry, shapes, new_tokens or (), num_beams or ())
        of_text = run_bench(
            printer, bundle, requests, chosen, runtimes=runtime, backbone=backbone, settings=settings
        )
        _finish(printer, of_text, output, fail_under, print_bench)
        return
    if new_tokens or num_beams:
        raise UsageError(f"{bundle} does not generate text.", "Leave out --new-tokens and --num-beams.")
    with ConsoleProgress(printer) as progress:
        result = bench(
            bundle,
            shapes or default_shapes(entry),
            chosen,
            runtimes=runtime,
            backbone=backbone,
            settings=settings,
            profile=profile,
            allow_unverified=allow_unverified,
            lean_runtime=lean_runtime,
            progress=progress,
        )
    _finish(printer, result, output, fail_under, _print)


def _finish(
    printer: Output,
    result: Any,
    output: Path | None,
    fail_under: float | None,
    show: Callable[[Output, Any], None],
) -> None:
    """Write and show a result, and end with code 4 if a variant is too slow."""
    if output is not None:
        write_json(output, result.as_dict())
    if printer.is_json:
        printer.document(result.as_dict())
    else:
        show(printer, result)
        if not result.settled:
            printer.hint(
                "warning: not every opening settled: other programs are running, or the clock speed changes. "
                "Increase --max-rounds or --block-seconds."
            )
    if isinstance(result, Benchmark):
        with printer.warning():  # the exit code depends on the result, which is printed already
            store_benchmark(result)
    slow = result.too_slow(fail_under) if fail_under is not None else []
    for line in slow:
        printer.hint(f"TOO SLOW (under {fail_under:g}): {line}")
    if slow:
        raise typer.Exit(TooSlowError.exit_code)


def _check_gate(
    least: float, runtimes: Sequence[str] | None, bundle: Path, variants: Sequence[int | str]
) -> None:
    """Refuse a gate that compares nothing, because everything would pass it."""
    if not math.isfinite(least):
        raise UsageError(f"--fail-under {least} is not a speed-up.", "Give a number, for example 1.5.")
    if runtimes and not {*runtimes} & {*OWN_RUNTIMES}:
        raise UsageError(
            f"--fail-under compares runtimes of a bundle, and {', '.join(runtimes)} is not among them.",
            "Add --runtime onnxruntime.",
        )
    of_bundle = read_manifest(bundle).variants
    if all(v.baseline for v in of_bundle if not variants or any(map(v.answers_to, variants))):
        raise UsageError(
            "--fail-under compares ratios above 1, and none is chosen.", "Choose other ratios, or build them."
        )


def default_shapes(backbone: BackboneEntry) -> list[tuple[int, int]]:
    """Return the default shapes, with longer sequences cut to the limit of the bundle's model."""
    shapes = [options.parse_shape(text) for text in _DEFAULT_SHAPES]
    return list(dict.fromkeys((b, backbone.clamp_length(s)) for b, s in shapes))


def _print(printer: Output, result: Benchmark) -> None:
    for shape in result.shapes:
        printer.table(_table(shape, _quality_columns(result)))
        for variant, rows in shape.profiles.items():
            printer.table(_profile_table(variant, shape, rows))
    for entry in result.break_even:
        where = (
            "off at no shape"
            if entry["pays_from"] is None
            else "off from {}x{} on".format(*entry["pays_from"])
        )
        printer.text(f"{entry['variant']} on {entry['runtime']} pays {where}")
    if result.settings.openings == 1:
        printer.hint(
            "note: one opening: the intervals leave out the difference between openings, a few per cent."
        )


def _quality_columns(result: Benchmark) -> dict[str, dict[str, float | None]]:
    """The losses by column and variant."""
    columns: dict[str, dict[str, float | None]] = {}
    for quality in result.quality:
        columns |= {
            f"{name} lost, {quality['data']}": {
                variant: counted_losses(quality, variant).get(name) for variant in quality["variants"]
            }
            for name in counted_metrics(quality)
        }
    return columns


def _table(shape: ShapeResult, quality: Mapping[str, Mapping[str, float | None]]) -> Table:
    state = "" if shape.settled else f" (only {shape.settled_openings} openings settled)"
    table = Table(title=f"{shape.batch_size} x {shape.sequence_length} tokens{state}", title_justify="left")
    table.add_column("runtime")
    table.add_column("variant")
    for name in (*SPEED_COLUMNS, *quality):
        table.add_column(name, justify="right")
    for row in shape.rows:
        lost = [found.get(row["variant"]) for found in quality.values()]
        cells = [*speed_cells(row), *("" if value is None else f"{value:.2%}" for value in lost)]
        table.add_row(row["runtime"], row["variant"], *cells)
    return table


def _profile_table(variant: str, shape: ShapeResult, rows: Sequence[Mapping[str, Any]]) -> Table:
    title = f"Where {variant} spends its time on onnxruntime at {shape.batch_size} x {shape.sequence_length}"
    table = Table(title=title, title_justify="left")
    table.add_column("module")
    for name in ("ms", "layers", "ms per layer", "share"):
        table.add_column(name, justify="right")
    table.add_column("operators")
    for row in rows[:_PROFILE_ROWS]:
        operators = ", ".join(f"{name} {time:.2f}" for name, time in list(row["operators"].items())[:4])
        layers, ms = row["layers"], row["milliseconds"]
        of_layers = ("", "") if layers is None else (str(layers), f"{ms / layers:.3f}")
        table.add_row(row["module"], f"{ms:.2f}", *of_layers, f"{row['share']:.1%}", operators)
    rest = rows[_PROFILE_ROWS:]
    if rest:
        milliseconds, share = (sum(row[name] for row in rest) for name in ("milliseconds", "share"))
        table.add_row(f"{len(rest)} others", f"{milliseconds:.2f}", "", "", f"{share:.1%}", "")
    return table
