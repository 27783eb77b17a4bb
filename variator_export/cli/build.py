"""`variator-export build`."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from variator_export.building.parallel import Order, Outcome, build_all
from variator_export.building.recipe_build import BuildResult, build, default_bundle
from variator_export.cli import completion, options
from variator_export.cli.build_tables import losses_table, outcomes_table, speed_table, verification_table
from variator_export.cli.output import ConsoleProgress, Format, Output, error_document
from variator_export.cli.push import PushOption, check_push, push_result
from variator_export.cli.recipe_flags import with_flags
from variator_export.core.errors import UsageError, UserError
from variator_export.engines.targets import build_targets
from variator_export.recipe.recipe import DEFAULT_RECIPE
from variator_export.recipe.recipe_file import ResolvedRecipe, shipped_recipes
from variator_export.verification.verified_graph import AS_IT_IS, how_it_runs


def build_command(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]...",
            help="A YAML file, or the name of a recipe that comes with the package. "
            f"Default: {DEFAULT_RECIPE}.",
            show_default=False,
            autocompletion=completion.recipes,
        ),
    ] = None,
    all_recipes: Annotated[
        bool, typer.Option("--all", help="Build every recipe that comes with the package.")
    ] = False,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio",
            metavar="K",
            help="A ratio to build; may be repeated. Ratio 1, the baseline, is always built.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="The pretrained model: a folder, ORGANISATION/NAME[@REVISION] on the hub, "
            "package:DISTRIBUTION/PATH, or recipes:PATH for a model of this package.",
        ),
    ] = None,
    task: options.TaskOption = None,
    architecture: options.ArchitectureOption = None,
    label_word: options.LabelWordOption = None,
    decoder_prompt: options.DecoderPromptOption = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A compression plugin, to replace the recipe's plugins: a folder, or "
            "hub:ORGANISATION/NAME[/FOLDER][@REVISION]; may be repeated. NAME defaults to ratio-K.",
        ),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A folder of modules, to replace the recipe's: a folder, recipes:PATH, or "
            "hub:ORGANISATION/NAME[/FOLDER][@REVISION]; may be repeated.",
        ),
    ] = None,
    assembly: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SPEC",
            help="A variant of modules and original layers: how many layers each of its layers stands for, "
            "such as enc=2,2,1x8, and ;k=4 to add the plugin of ratio 4; may be repeated. It replaces the "
            "recipe's assemblies.",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Choose an assembly of the modules that is X times faster than the original, from measured "
            "times of its layers. It replaces the recipe's strategies.",
        ),
    ] = None,
    max_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Choose an assembly with at most so many stored weights, such as 150MB."
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Of the assemblies within the budget with the most layers: speed-first chooses the fastest "
            "(default with --speedup), size-first the one with the fewest weights.",
        ),
    ] = None,
    untrained: Annotated[
        bool,
        typer.Option(
            "--untrained",
            help="Initialise an untrained plugin for each --ratio, to see the speed before training.",
        ),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help=f"A target to build for: {', '.join(build_targets())}; may be repeated.",
            autocompletion=completion.targets_to_build,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Precision of graphs and engines: float32, float16, bfloat16; int8 or int8-static for CPUs; "
            "int8-float16 or fp8 for GPUs.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Texts to calibrate int8-static, int8-float16 and fp8 on: .tsv, .csv, .jsonl, .conll or "
            "datasets:NAME,SPLIT.",
        ),
    ] = None,
    calibration_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column of these texts. Default: the recipe's, or text."),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="ONNX opset of the graphs: 23; or 20, in int8 21, for ONNX Runtime before 1.23.",
        ),
    ] = None,
    default_variant: Annotated[
        str | None,
        typer.Option(
            metavar="K|NAME",
            help="The variant that is also model.onnx, and that a session runs by default. Default: ratio 1.",
        ),
    ] = None,
    adapters: Annotated[
        bool | None,
        typer.Option(
            "--adapters/--no-adapters",
            help="Also write each plugin as ratio-K.onnx_adapter, ONNX Runtime's own format.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The bundle's folder. Default: artifacts/NAME, with the recipe's name, and -PRECISION added "
            "for half precision. For several recipes: the parent of their folders.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start afresh instead of adding to an existing bundle.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure the speed-up at the end.")
    ] = True,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Recipes to build side by side, each in its own process. Their speed is measured at the "
            "end, one recipe after the other.",
        ),
    ] = 1,
    show_recipe: Annotated[
        bool,
        typer.Option(
            "--show-recipe", help="Print the whole recipe and the origin of each value. Build nothing."
        ),
    ] = False,
    push_to_hub: PushOption = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Turn a backbone and its compression plugins into a verified bundle.

    The backbone is traced once. Every ratio is bound from that trace, compared with eager PyTorch, and
    published only if the numbers agree. An existing bundle is extended, and unchanged parts are reused.
    Several recipes are built one after the other or side by side. A failing recipe does not stop the others,
    and repeating the command builds only the missing parts.

    **Examples**

    `variator-export build` builds the default recipe.

    `variator-export build --ratio 4 --target onnxruntime` builds one ratio without a TensorRT engine.

    `variator-export build --backbone ./my-bert --plugin ./my-plugin --output ./my-bundle`

    `variator-export build --backbone ./my-bert --ratio 4 --untrained --output ./speed` measures the speed
    before a plugin is trained.

    `variator-export build --module modules/g2 --assembly enc=2x3 --assembly "enc=2x3;k=4"` builds a stack of
    three modules, without and with the compression plugin of ratio 4.

    `variator-export build my-recipe.yaml --ratio 4 --show-recipe`

    `variator-export build recipes/*.yaml --jobs 2 --format json`
    """
    printer = Output(format)
    names = shipped_recipes() if all_recipes else list(dict.fromkeys(recipes or [DEFAULT_RECIPE]))
    if all_recipes and recipes:
        raise UsageError("--all and recipes were both given.", "Give one of them.")
    if len(names) > 1:
        alone = {
            "--backbone": backbone,
            "--plugin": plugin,
            "--module": module,
            "--assembly": assembly,
            "--speedup": speedup,
            "--max-weights": max_weights,
            "--show-recipe": show_recipe,
            "--push-to-hub": push_to_hub,
        }
        for option, value in alone.items():
            if value:
                raise UsageError(
                    f"{option} is for one recipe, but {len(names)} were given.", "Give one recipe."
                )
    check_push(push_to_hub)
    resolved = [
        with_flags(
            name,
            ratios=ratio,
            backbone=backbone,
            task=task,
            architecture=architecture,
            label_words=label_word,
            decoder_prompt=decoder_prompt,
            plugins=plugin,
            modules=module,
            assemblies=assembly,
            strategy=strategy,
            speedup=speedup,
            max_weights=max_weights,
            untrained=untrained,
            targets=target,
            precision=precision,
            calibration=calibration,
            calibration_column=calibration_column,
            opset=opset,
            default_variant=default_variant,
            adapters=adapters,
            output=output,
            speed=speed,
        )
        for name in names
    ]
    if show_recipe:
        _show(printer, resolved[0])
    elif len(names) > 1:
        _build_several(printer, resolved, output, replace=replace, jobs=jobs)
    else:
        with ConsoleProgress(printer) as progress:
            result = build(resolved[0].recipe, output, replace=replace, progress=progress)
        if not printer.is_json:
            _print(printer, result)
        pushed = push_result(printer, result.bundle, push_to_hub)
        if printer.is_json:
            printer.document({**_document(result), "pushed": pushed})


def _show(printer: Output, resolved: ResolvedRecipe) -> None:
    if printer.is_json:
        recipe = resolved.recipe.model_dump(mode="json")
        printer.document({"recipe": recipe, "origins": dict(resolved.origins)})
    else:
        printer.text(resolved.to_yaml().rstrip())


def _build_several(
    printer: Output, resolved: Sequence[ResolvedRecipe], output: Path | None, *, replace: bool, jobs: int
) -> None:
    recipes = [entry.recipe for entry in resolved]
    orders = [
        Order(recipe, default_bundle(recipe) if output is None else output / recipe.name)
        for recipe in recipes
    ]
    width = max(len(recipe.name) for recipe in recipes)
    outcomes = build_all(
        orders,
        jobs=jobs,
        replace=replace,
        progress_of=lambda name: ConsoleProgress(printer, prefix=f"{name:{width}}  "),
    )
    if printer.is_json:
        printer.document({"builds": [_outcome(outcome) for outcome in outcomes]})
    else:
        printer.text()
        printer.table(outcomes_table(outcomes))
        for outcome in outcomes:
            if outcome.error is not None:
                printer.error(UserError(f"{outcome.name}: {outcome.error.message}", outcome.error.hint))
    code = max(outcome.exit_code for outcome in outcomes)
    if code:
        raise typer.Exit(code)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    error = outcome.error
    return {
        "recipe": outcome.name,
        "state": outcome.state,
        **({"bundle": str(outcome.bundle)} if outcome.result is None else _document(outcome.result)),
        "error": None if error is None else error_document(error),
    }


def _document(result: BuildResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "published": result.published,
        "steps": [asdict(step) for step in result.steps],
        "verification": dict(result.verification),
        "quantization": dict(result.losses),
        "speed": result.speed,
        "untrained": list(result.untrained),
        "plugins_of_assemblies": dict(result.plugins_of_assemblies),
        "precision": result.precision,
    }


def _print(output: Output, result: BuildResult) -> None:
    output.text()
    state = "published" if result.published else "up to date"
    output.text(f"{state}: {result.bundle}")
    output.text()
    output.table(verification_table(result))
    if result.losses:
        output.text()
        output.table(losses_table(result))
    if (how := how_it_runs(result.precision)) != AS_IT_IS:
        output.hint(f"The graphs were verified {how}.")
    if result.speed is not None:
        output.text()
        output.table(speed_table(result.speed))
        if not result.speed["settled"]:
            output.hint(
                "warning: the speed did not settle: other programs are running, or the clock speed changes. "
                f"Measure it again: variator-export bench {shlex.quote(str(result.bundle))}"
            )
    if result.untrained:
        output.hint("")
        output.hint(
            f"warning: the plugins or modules of {', '.join(result.untrained)} were not trained. The "
            "speed is real, but the outputs at these ratios are not useful until the plugins are trained."
        )
    if plugins := result.plugins_of_assemblies:
        losses = ", ".join(
            f"{name} ({'not evaluated' if loss is None else f'loses {loss:.1%}'})"
            for name, loss in plugins.items()
        )
        output.hint("")
        output.hint(
            "warning: these variants have a plugin that was trained for the original layers, and modules: "
            f"{losses}. They lose more than either alone."
        )
        if None in plugins.values():
            output.hint(f"Measure it: variator-export evaluate {shlex.quote(str(result.bundle))} --data FILE")
