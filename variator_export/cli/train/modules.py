"""`variator-export train modules`."""

from typing import Annotated

import typer

from variator_export.cli import options
from variator_export.cli.output import Format, Output
from variator_export.cli.push import PushOption, check_push
from variator_export.cli.train import common
from variator_export.core.errors import UsageError


def modules_command(
    output: options.OutputOption,
    text: options.TextsOption = None,
    granularity: Annotated[
        list[int] | None,
        typer.Option(min=2, metavar="G", help="Layers that each module replaces; may be repeated."),
    ] = None,
    backbone: options.BackboneOption = None,
    task: options.TaskOption = None,
    architecture: options.ArchitectureOption = None,
    start: Annotated[
        str,
        typer.Option(
            metavar="L", help="The layer of its group that a module starts from: first, middle or last."
        ),
    ] = "last",
    replace_begin: Annotated[
        float,
        typer.Option(metavar="P", help="Probability in the first step that a module replaces its layers."),
    ] = 0.5,
    replace_end: Annotated[
        float,
        typer.Option(metavar="P", help="The same probability at the end of its rise, and from then on."),
    ] = 0.9,
    replace_rise: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the steps in which that probability rises.")
    ] = 0.5,
    steps: options.StepsOption = 4000,
    batch_size: options.BatchOption = 32,
    learning_rate: options.RateOption = 5e-4,
    schedule: options.ScheduleOption = "linear",
    warmup_steps: options.WarmupOption = 50,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM=WEIGHT",
            help=f"A term of the loss: {', '.join(options.MODULE_LOSS_TERMS)}; may be repeated.",
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in the shortest passages.")] = 8,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens in the longest passages.")] = 128,
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
    """Train modules on plain text: layers that each do the work of several (Modular Transformers).

    Each step replaces some groups of layers by their modules; the original is the teacher. All granularities
    are trained in one run and published as OUTPUT/gG. `build --module DIR --assembly SPEC` assembles them.
    Repeat the command to resume a run that was killed. On several GPUs or machines, use `accelerate launch
    --multi_gpu -m variator_export train modules ...`.

    **Examples**

    `variator-export train modules --text novels/ --granularity 2 --granularity 3 --output modules`

    `variator-export train modules --text a.jsonl --granularity 2 --backbone ./my-bert --output m`
    """
    if not text:
        raise UsageError(
            "There is no text to train on.", "Give --text SRC: a file, a folder, or datasets:NAME."
        )
    if not granularity:
        raise UsageError(
            "There is no granularity to train modules for.", "Give, for example, --granularity 2."
        )
    options.require_training()
    check_push(push_to_hub)
    from variator_export.data.texts import read_texts
    from variator_export.training.modular.pretrain import default_losses, pretrain_modules
    from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
    from variator_export.training.settings import PassageSettings

    shape = options.checked(ModuleShape, {"granularities": tuple(dict.fromkeys(granularity)), "start": start})
    weights = options.parse_losses(loss, options.MODULE_LOSS_TERMS)
    losses = options.checked(ModuleLosses, {"hidden": 0.0, **weights}) if loss else None
    replacing = options.checked(Replacing, {"begin": replace_begin, "end": replace_end, "rise": replace_rise})
    passages = options.checked(
        PassageSettings,
        {
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "held_out": held_out,
            "held_out_passages": held_out_passages,
        },
    )
    optimisation = common.optimisation_of(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
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
        result = pretrain_modules(
            loaded,
            read_texts(text, text_field),
            run,
            shape=shape,
            losses=losses or default_losses(loaded),
            replacing=replacing,
            passages=passages,
            optimisation=optimisation,
        )
    common.print_results(printer, "modules", result, output, push_to_hub)
