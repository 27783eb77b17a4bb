"""`variator-export compile` and `variator-export merge`."""

import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, get_args

import typer

from variator_export.building.compile_engines import (
    CompileResult,
    compile_engines,
    merge_engines,
    recipe_of_engines,
)
from variator_export.building.steps.engines import EngineOrder
from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import EngineEntry
from variator_export.cli import completion, options
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.core.errors import UsageError
from variator_export.engines.request import TimingCacheMode
from variator_export.engines.targets import engine_targets
from variator_export.recipe.recipe import CAPABILITIES
from variator_export.recipe.recipe_file import load_recipe

_CACHE_MODES = get_args(TimingCacheMode)


def compile_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, to which the engines are added.")],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="T",
            help=f"A target to build for: {', '.join(engine_targets())}; may be repeated.",
            autocompletion=completion.targets_with_engines,
        ),
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Only this variant, or {ANY_RATIO} for one engine that runs every ratio; may be repeated. "
            "Default: as in the recipe.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="The recipe whose `engine` section to use. Default: the recipe of the bundle.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="tensorrt-rtx: the GPUs to build for, sm89, or sm86+sm89 for one engine that runs on both; "
            "may be repeated, for separate engines. Default: one engine for all GPUs from sm80 on.",
        ),
    ] = None,
    timing_cache: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="tensorrt: whether to keep kernel timings from build to build: ignore, use, or require "
            "(fail if a timing is missing).",
        ),
    ] = "ignore",
    strip_weights: Annotated[
        bool | None,
        typer.Option(
            "--strip-weights/--with-weights",
            help="tensorrt: leave the weights out of the engines; sessions load them from the bundle. "
            "Default: as in the recipe.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Engines to build side by side; tensorrt builds one at a time."
        ),
    ] = 1,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Build engines from a finished bundle, on the machine that needs them.

    The command needs the target's TensorRT, but not torch, transformers or the backbone. Existing engines are
    kept.

    **Examples**

    `variator-export compile artifacts/minilm --target tensorrt-rtx`

    `variator-export compile artifacts/minilm --target tensorrt-rtx --compute-capability sm89
    --compute-capability sm120 --jobs 2`

    `variator-export compile artifacts/minilm --target tensorrt --variant any-ratio --timing-cache use`
    """
    for name in target:
        options.choose("--target", name, tuple(engine_targets()))
    options.choose("--timing-cache", timing_cache, _CACHE_MODES)
    how = load_recipe(recipe).engine if recipe is not None else recipe_of_engines(bundle)
    for names in compute_capability or ():
        if not re.fullmatch(CAPABILITIES, names):
            raise UsageError(
                f"--compute-capability {names!r} is not a compute capability.",
                "--compute-capability sm89, or sm86+sm89 for both",
            )
    asked = {"compute_capabilities": compute_capability or None, "strip_weights": strip_weights}
    content = how.model_dump(mode="json") | {
        name: value for name, value in asked.items() if value is not None
    }
    how = options.checked(type(how), content)
    order = EngineOrder(
        options=how,
        targets=tuple(dict.fromkeys(target)),
        only=tuple(dict.fromkeys(variant)) if variant else None,
        jobs=jobs,
        timing_cache=timing_cache,  # type: ignore[arg-type]  # one of the modes
    )
    printer = Output(format)
    with ConsoleProgress(printer) as progress:
        result = compile_engines(bundle, order, progress)
    _print(printer, result)


def merge_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle to which the engines are added.")],
    others: Annotated[
        list[Path] | None, typer.Argument(help="Copies of the bundle that were compiled elsewhere.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Merge the engines of copies of one bundle that several machines compiled.

    The copies must have the same graphs, weights and plugins. An engine is executable code: merge engines
    only from machines that you trust.

    **Examples**

    `variator-export merge artifacts/minilm from-l4/minilm from-h100/minilm`
    """
    if not others:
        raise UsageError("There is no other bundle to merge.", f"variator-export merge {bundle} OTHER")
    printer = Output(format)
    with ConsoleProgress(printer) as progress:
        result = merge_engines(bundle, others, progress)
    _print(printer, result)


def _print(printer: Output, result: CompileResult) -> None:
    if printer.is_json:
        printer.document(
            {**asdict(result), "bundle": str(result.bundle), "engines": _entries(result.engines)}
        )
        return
    printer.text()
    printer.text(f"{'published' if result.published else 'up to date'}: {result.bundle}")
    for entry in result.engines:
        name = PurePosixPath(entry.engine).stem
        printer.text(f"{name:12} {entry.target} {entry.version} {entry.platform}: {entry.engine}")


def _entries(engines: tuple[EngineEntry, ...]) -> list[dict[str, Any]]:
    return [entry.model_dump(mode="json") for entry in engines]
