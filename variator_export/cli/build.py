"""`variator-export build`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from variator_export.cli import options
from variator_export.cli.output import ConsoleProgress, Format, Output
from variator_export.core.errors import UsageError, UserError
from variator_export.core.recipe import (
    DEFAULT_RECIPE,
    TARGETS,
    BackboneRecipe,
    PluginRecipe,
    Recipe,
    load_recipe,
    parse_recipe,
)
from variator_export.core.validation import nearest
from variator_export.pipeline.build import BuildResult, build
from variator_export.pipeline.plan import parse_ratio
from variator_export.stages.budget import MULTIPLE


def build_command(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a recipe that comes with the package.")
    ] = DEFAULT_RECIPE,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio",
            metavar="K",
            help="A ratio to build; may be repeated. Ratio 1, the baseline, comes along.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The pretrained model: a folder, or package:DISTRIBUTION/PATH."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="What the model is to do, as Optimum names it: feature-extraction, text-classification, "
            "token-classification, question-answering, fill-mask. Default: what its config.json names.",
        ),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A compression plugin, instead of those of the recipe; may be repeated. "
            "NAME defaults to ratio-K.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="T", help=f"What to build for: {', '.join(TARGETS)}; may be repeated."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="Of the graphs. This version knows float32.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle's folder; default artifacts/RECIPE-NAME.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start afresh instead of adding to the bundle that is there.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure the speed-up at the end.")
    ] = True,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Turn a backbone and its compression plugins into a verified bundle.

    The backbone is traced once; every ratio is bound from that trace, compared with eager PyTorch and
    published only if the numbers agree. A bundle that is there is added to: what has not changed is reused.

    **Examples**

    `variator-export build` builds the default recipe.

    `variator-export build --ratio 4 --target onnxruntime` builds one ratio without a TensorRT engine.

    `variator-export build --backbone ./my-bert --plugin ./my-plugin --output ./my-bundle`

    `variator-export build my-recipe.yaml --format json --no-speed`
    """
    printer = Output(format)
    resolved = resolve_recipe(recipe, ratio, backbone, task, plugin, target, precision, output, speed)
    progress = ConsoleProgress(printer)
    try:
        result = build(resolved, output, replace=replace, progress=progress)
    finally:
        progress.close()
    if printer.is_json:
        printer.document(_document(result))
    else:
        _print(printer, result)


def resolve_recipe(
    recipe: str,
    ratios: list[str] | None,
    backbone: str | None,
    task: str | None,
    plugins: list[str] | None,
    targets: list[str] | None,
    precision: str | None,
    output: Path | None,
    speed: bool,
) -> Recipe:
    """The recipe with the flags over it."""
    loaded = load_recipe(recipe)
    changes: dict[str, Any] = {}
    if ratios:
        changes["ratios"] = tuple(sorted({parse_ratio(text) for text in ratios}))
    if backbone is not None:
        if output is None and recipe == DEFAULT_RECIPE:
            raise UsageError(
                "--backbone needs --output: the default recipe's folder is for the default backbone.",
                f"variator-export build --backbone {backbone} --output artifacts/NAME",
            )
        # A pin and an architecture belong to the recipe's own backbone.
        changes["backbone"] = BackboneRecipe(source=backbone, task=task)
    elif task is not None:
        changes["backbone"] = loaded.backbone.model_copy(update={"task": task, "architecture": None})
    if plugins:
        changes["plugins"] = tuple(_plugin(text) for text in plugins)
        if not ratios:
            changes["ratios"] = None
    if targets:
        for target in targets:
            if target not in TARGETS:
                guess = nearest(target, list(TARGETS))
                raise UserError(
                    f"There is no target {target!r}; there are {', '.join(TARGETS)}.",
                    f"--target {guess or TARGETS[0]}",
                )
        changes["targets"] = tuple(dict.fromkeys(targets))
    if not speed:
        changes["speed"] = None
    merged = loaded.model_copy(update=changes)
    if precision is not None:
        # Through the validation, which knows the choices.
        return parse_recipe({**merged.model_dump(), "precision": precision}, f"{recipe} with --precision")
    return merged


def _plugin(text: str) -> PluginRecipe:
    name, source = options.named_plugin(text)
    content = {"name": name, "source": source}
    checked = parse_recipe({"name": "flags", "backbone": {"source": "."}, "plugins": [content]}, "--plugin")
    return checked.plugins[0]


def _document(result: BuildResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "published": result.published,
        "steps": [asdict(step) for step in result.steps],
        "verification": dict(result.verification),
        "speed": result.speed,
        "untrained": list(result.untrained),
    }


def _print(output: Output, result: BuildResult) -> None:
    output.text()
    state = "published" if result.published else "up to date"
    output.text(f"{state}: {result.bundle}")
    output.text()
    output.table(_verification_table(result))
    if result.speed is not None:
        output.text()
        output.table(speed_table(result.speed))
    if result.untrained:
        output.hint("")
        output.hint(
            f"warning: {', '.join(result.untrained)}: plugins that were only initialised, not trained. The "
            "speed is real; what the model says at these ratios is not useful until they are trained."
        )


def _verification_table(result: BuildResult) -> Table:
    table = Table(
        title="Verified against eager PyTorch in float64; at most "
        f"{MULTIPLE:g} times its own rounding in float32 is allowed",
        title_justify="left",
    )
    for name in ("variant", "graph", "case", "output"):
        table.add_column(name)
    for name in ("max abs", "rel. Frobenius", "x rounding"):
        table.add_column(name, justify="right")
    for variant, found in result.verification.items():
        if found is None:
            table.add_row(variant, "report missing", *[""] * 5)
            continue
        table.add_row(
            variant,
            found["graph"],
            found["case"],
            found["output"],
            f"{found['max_abs']:.1e}",
            f"{found['relative_frobenius']:.1e}",
            f"{found['used']:.2f}",
        )
    return table


def speed_table(speed: Any) -> Table:
    """Eager and exported at every ratio, beside what the saved MACs would allow."""
    shape = f"batch {speed['batch_size']}, {speed['sequence_length']} tokens"
    title = (
        f"Speed at {shape}, medians of {speed['rounds']} alternating rounds on {speed['machine']['cpu']}, "
        f"{speed['machine']['cpu_cores']} cores; eager is PyTorch with SDPA"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("runtime")
    table.add_column("variant")
    for name in (
        "ms",
        "speed-up",
        "95 % interval",
        "MACs allow",
        "reached",
        "over eager k=1",
        "MACs",
        "on graph",
    ):
        table.add_column(name, justify="right")
    for row in speed["rows"]:
        first = row["ratio"] == 1
        table.add_row(
            row["runtime"],
            row["variant"],
            f"{row['median_ms']:.1f}",
            "" if first else f"{row['speedup']:.2f}x",
            "" if first else f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
            "" if first else f"{row['speedup_allowed']:.2f}x",
            "" if first else f"{row['share_of_allowed']:.0%}",
            f"{row['speedup_over_eager']:.2f}x",
            f"{row['macs'] / 1e9:.2f} G",
            "" if row["graph_macs"] is None else f"{row['graph_macs'] / 1e9:.2f} G",
        )
    return table
