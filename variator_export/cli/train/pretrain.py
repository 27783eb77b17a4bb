"""`variator-export train pretrain`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from variator_export.building.plan import parse_ratio
from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.cli.push import PushOption, check_push
from variator_export.cli.train import common
from variator_export.core.errors import UsageError


def pretrain_command(
    output: options.OutputOption,
    text: options.TextsOption = None,
    ratio: Annotated[
        list[str] | None, typer.Option(metavar="K", help="A ratio to train a plugin for; may be repeated.")
    ] = None,
    plugin: options.PluginsOption = None,
    backbone: options.BackboneOption = None,
    task: options.TaskOption = None,
    architecture: options.ArchitectureOption = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Defaults of the other options: default, or paper (the paper's settings)."
        ),
    ] = "default",
    steps: options.StepsOption = 4000,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = None,
    schedule: options.ScheduleOption = "linear",
    warmup_steps: options.WarmupOption = 50,
    loss: options.LossOption = None,
    bottleneck_size: Annotated[
        int | None, typer.Option(metavar="N", help="Width of the decompression layer's bottleneck.")
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="Masking: none, as in the paper's code, or exclude-padding."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="S", help="Initialisation: paper, or teacher (closer to the teacher)."),
    ] = None,
    decompression: Annotated[
        bool | None,
        typer.Option(
            "--decompression/--no-decompression",
            help="Use the decompression layer. Leave it out only for an ablation.",
        ),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in the shortest passages.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in the longest passages.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(metavar="X", help="Average share of tokens replaced with random ones.")
    ] = None,
    corruption: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of tokens left out in spans, which T5's decoder then generates. Default: 0.15 for T5 "
            "and mT5 without --loss, else 0.",
        ),
    ] = None,
    held_out: options.HeldOutOption = 0.02,
    held_out_passages: options.HeldOutPassagesOption = 512,
    text_field: options.TextFieldOption = "text",
    seed: options.SeedOption = 0,
    precision: options.PrecisionOption = "auto",
    eval_every: options.EvalOption = 200,
    patience: options.PatienceOption = None,
    dtype: options.DtypeOption = "float16",
    terms: options.TermsOption = None,
    replace: options.ReplaceOption = False,
    restart: options.RestartOption = False,
    push_to_hub: PushOption = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Train plugins on plain text, without labels: new plugins, or existing ones further on your own texts.

    The teacher is the backbone without plugins; several ratios share its forward pass. Repeat the command to
    resume a run that was killed. On several GPUs or machines, use `accelerate launch --multi_gpu -m
    variator_export train pretrain ...`.

    **Examples**

    `variator-export train pretrain --text novels/ --ratio 2 --ratio 4 --output plugins`

    `variator-export train pretrain --text a.jsonl --ratio 4 --preset paper --backbone ./my-bert --output p`

    `variator-export train pretrain --text mine.txt --plugin recipes:minilm/ratio-4 --steps 500 --output mine`
    """
    if not text:
        raise UsageError(
            "There is no text to train on.", "Give --text SRC: a file, a folder, or datasets:NAME."
        )
    if not ratio and not plugin:
        raise UsageError(
            "There is no ratio to train a plugin for.",
            "Give, for example, --ratio 4, or a plugin to train further: --plugin DIR",
        )
    of_new_plugins = {
        "--ratio": ratio,
        "--bottleneck-size": bottleneck_size,
        "--masking": masking,
        "--start": start,
        "--decompression": decompression,
    }
    given = [name for name, value in of_new_plugins.items() if value is not None]
    if plugin and given:
        raise UsageError(
            f"{given[0]} is for new plugins; plugins from --plugin keep their shape.",
            f"Leave out {given[0]} or --plugin.",
        )
    options.require_training()
    check_push(push_to_hub)
    from variator_export.data.texts import read_texts
    from variator_export.training.pretrain import fit_preset, pretrain
    from variator_export.training.settings import (
        PRETRAIN_PRESETS,
        Losses,
        PassageSettings,
        PluginShape,
    )

    base = PRETRAIN_PRESETS[options.choose("--preset", preset, tuple(PRETRAIN_PRESETS))]
    plugins = (
        common.plugin_folders(plugin)
        if plugin
        else options.checked(
            PluginShape,
            {
                "ratios": _ratios(ratio or ()),
                "bottleneck_size": base.bottleneck_size if bottleneck_size is None else bottleneck_size,
                "masking": base.masking if masking is None else masking,
                "start": base.start if start is None else start,
                "decompression": decompression is not False,
            },
        )
    )
    losses = options.checked(Losses, {"hidden": 0.0, **options.parse_losses(loss)}) if loss else base.losses
    passages = options.checked(
        PassageSettings,
        {
            "min_tokens": base.passages.min_tokens if min_tokens is None else min_tokens,
            "max_tokens": base.passages.max_tokens if max_tokens is None else max_tokens,
            "noise": base.passages.noise if noise is None else noise,
            "corruption": corruption or 0.0,
            "held_out": held_out,
            "held_out_passages": held_out_passages,
        },
    )
    optimisation = common.optimisation_of(
        steps=steps,
        batch_size=batch_size,
        learning_rate=base.learning_rate if learning_rate is None else learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        seed=seed,
        precision=precision,
        eval_every=eval_every,
        patience=patience,
    )
    printer = Output(format)
    with common.running(printer, output, replace=replace, restart=restart, terms=terms, dtype=dtype) as run:
        loaded = common.load(backbone, task, architecture)
        if not loss:
            losses, passages = fit_preset(loaded, losses, passages, with_decoder=corruption != 0)
        result = pretrain(
            loaded,
            read_texts(text, text_field),
            run,
            plugins=plugins,
            losses=losses,
            passages=passages,
            optimisation=optimisation,
        )
    common.print_results(printer, "plugins", result, output, push_to_hub)


def _ratios(values: Sequence[str]) -> tuple[int, ...]:
    ratios = tuple(dict.fromkeys(parse_ratio(k) for k in values))
    if 1 in ratios:
        raise UsageError("Ratio 1 compresses nothing and has no plugin.", "Give ratios of 2 or more.")
    return ratios
